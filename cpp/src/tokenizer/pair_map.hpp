// Merges by the two ids they join.
#ifndef LLM2SLM_TOKENIZER_PAIR_MAP_HPP
#define LLM2SLM_TOKENIZER_PAIR_MAP_HPP

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llm2slm::detail::tokenizing {

/// What two tokens become and how early.
struct Merge {
  std::uint32_t rank, id;
};

/// A hash table with open addressing: an encoder looks up a pair for nearly every character.
class PairMap {
 public:
  explicit PairMap(std::size_t count) {
    std::size_t size = 16;
    while (size < count * 2) size *= 2;
    slots_.resize(size);
  }

  /// Of equal pairs the last one counts. No more than `count` may be put.
  void put(std::uint32_t left, std::uint32_t right, Merge merge) {
    Slot& slot = slots_[place(left, right)];
    slot = {left, right, merge, true};
  }
  /// Null where the two are not merged.
  const Merge* find(std::uint32_t left, std::uint32_t right) const {
    const Slot& slot = slots_[place(left, right)];
    return slot.used ? &slot.merge : nullptr;
  }

 private:
  struct Slot {
    std::uint32_t left = 0, right = 0;
    Merge merge{};
    bool used = false;
  };

  std::size_t place(std::uint32_t left, std::uint32_t right) const {
    std::uint64_t hash = (static_cast<std::uint64_t>(left) << 32 | right) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 32;
    for (std::size_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
      const Slot& slot = slots_[at];
      if (!slot.used || (slot.left == left && slot.right == right)) return at;
    }
  }

  std::vector<Slot> slots_;
};

}  // namespace llm2slm::detail::tokenizing

#endif
