#include "random.hpp"

#include <array>
#include <cmath>

namespace llm2slm::detail {
namespace {

// SeedSequence: mixes the entropy into a pool of words, so that every bit affects every word.
class SeedSequence {
 public:
  explicit SeedSequence(const std::vector<std::uint32_t>& entropy) {
    std::uint32_t constant = 0x43b0d7e5;
    const auto hashed = [&constant](std::uint32_t value) {
      value ^= constant;
      constant *= 0x931e8875;
      value *= constant;
      return value ^ value >> 16;
    };
    const auto mixed = [](std::uint32_t x, std::uint32_t y) {
      const std::uint32_t result = 0xca01f9ddU * x - 0x4973f715U * y;
      return result ^ result >> 16;
    };
    for (std::size_t i = 0; i < pool_.size(); ++i) pool_[i] = hashed(i < entropy.size() ? entropy[i] : 0);
    for (std::size_t from = 0; from < pool_.size(); ++from) {
      for (std::size_t to = 0; to < pool_.size(); ++to) {
        if (from != to) pool_[to] = mixed(pool_[to], hashed(pool_[from]));
      }
    }
    for (std::size_t from = pool_.size(); from < entropy.size(); ++from) {
      for (std::uint32_t& word : pool_) word = mixed(word, hashed(entropy[from]));
    }
  }

  /// generate_state(4, uint64)
  std::array<std::uint64_t, 4> state() const {
    std::uint32_t constant = 0x8b51f9dd;
    std::array<std::uint64_t, 4> words{};
    for (std::size_t i = 0; i < 8; ++i) {
      std::uint32_t value = pool_[i % pool_.size()] ^ constant;
      constant *= 0x58f38ded;
      value *= constant;
      value ^= value >> 16;
      words[i / 2] |= std::uint64_t{value} << (i % 2 * 32);
    }
    return words;
  }

 private:
  std::array<std::uint32_t, 4> pool_{};
};

// Numbers as SeedSequence's input: 32-bit words, the lowest first, at least one each.
std::vector<std::uint32_t> halved(const std::vector<std::uint64_t>& numbers) {
  std::vector<std::uint32_t> words;
  for (const std::uint64_t number : numbers) {
    words.push_back(static_cast<std::uint32_t>(number));
    if (number >> 32 != 0) words.push_back(static_cast<std::uint32_t>(number >> 32));
  }
  return words;
}

constexpr double kScale = 9007199254740992.0;  // 2^53
// Where the ziggurat's tail begins: where 256 layers of one area reach the top.
constexpr long double kTail = 7.69711747013104971404462804811L;

// The layers of exp(-x), the widest last: how far numbers of 53 bits are surely inside, their unit, and the height. Each is computed
// from the one below it, with more digits than are kept.
struct Ziggurat {
  std::array<std::uint64_t, 256> inside{};
  std::array<double, 256> unit{}, height{};

  Ziggurat() {
    const long double area = std::exp(-kTail) * (kTail + 1), base = kTail + 1;
    const auto scaled = [](long double edge) { return static_cast<double>(edge / static_cast<long double>(kScale)); };
    const auto share = [](long double of) { return static_cast<std::uint64_t>(of * static_cast<long double>(kScale)); };
    inside[0] = share(kTail / base);
    unit[0] = scaled(base);
    unit[255] = scaled(kTail);
    height[0] = 1;
    height[255] = static_cast<double>(std::exp(-kTail));
    long double edge = kTail;
    for (std::size_t i = 254; i >= 1; --i) {
      const long double below = edge;
      edge = -std::log(area / edge + std::exp(-edge));
      inside[i + 1] = share(edge / below);
      height[i] = static_cast<double>(std::exp(-edge));
      unit[i] = scaled(edge);
    }
  }
};

}  // namespace

Random::Random(const std::vector<std::uint64_t>& words) {
  const std::array<std::uint64_t, 4> seed = SeedSequence(halved(words)).state();
  increment_ = (Wide{seed[2]} << 64 | seed[3]) << 1 | 1;
  next();
  state_ += Wide{seed[0]} << 64 | seed[1];
  next();
}

std::uint64_t Random::next() {
  state_ = state_ * (Wide{0x2360ed051fc65da4} << 64 | 0x4385df649fccf645) + increment_;
  const auto folded = static_cast<std::uint64_t>(state_ >> 64) ^ static_cast<std::uint64_t>(state_);
  const auto turn = static_cast<unsigned>(state_ >> 122);
  return folded >> turn | folded << ((64 - turn) & 63);
}

double Random::uniform() { return static_cast<double>(next() >> 11) / kScale; }

double Random::exponential() {
  static const Ziggurat layers;
  while (true) {
    const std::uint64_t drawn = next() >> 3;
    const std::size_t layer = drawn & 0xff;
    const std::uint64_t position = drawn >> 8;
    const double x = static_cast<double>(position) * layers.unit[layer];
    if (position < layers.inside[layer]) return x;
    if (layer == 0) return static_cast<double>(kTail) - std::log1p(-uniform());
    const double top = layers.height[layer - 1], bottom = layers.height[layer];
    if ((top - bottom) * uniform() + bottom < std::exp(-x)) return x;
  }
}

}  // namespace llm2slm::detail
