#include "batching.hpp"

#include <algorithm>
#include <numeric>

namespace llm2slm::detail {
namespace {

using Indices = std::vector<std::size_t>;

// How far a prompt may be moved to find company: a longer window pads less, and keeps earlier answers waiting longer.
constexpr std::size_t kWindowBatches = 16;
// Then a batch's padded area is at most twice its real tokens, whatever the lengths.
constexpr std::size_t kLongestPerShortest = 2;

// Cut indices, shortest prompt first, where a batch is full or a prompt is too long for the company it would have.
std::vector<Indices> cut(const Indices& indices, const std::vector<std::size_t>& lengths, std::size_t size) {
  std::vector<Indices> made;
  for (const std::size_t index : indices) {
    const bool fresh = made.empty() || made.back().size() == size ||
                       lengths[index] > kLongestPerShortest * lengths[made.back().front()];
    if (fresh) made.emplace_back();
    made.back().push_back(index);
  }
  for (Indices& batch : made) std::sort(batch.begin(), batch.end());
  std::sort(made.begin(), made.end());
  return made;
}

}  // namespace

std::vector<Indices> batches(const std::vector<std::size_t>& lengths, std::size_t size) {
  const std::size_t most = lengths.size();
  // So that 16 batches of any number cannot wrap around.
  const std::size_t window = size == 0 || size > most ? most : size * kWindowBatches;
  std::vector<Indices> all;
  for (std::size_t first = 0; first < most; first += window) {
    Indices indices(std::min(window, most - first));
    std::iota(indices.begin(), indices.end(), first);
    std::stable_sort(indices.begin(), indices.end(), [&](std::size_t a, std::size_t b) { return lengths[a] < lengths[b]; });
    for (Indices& batch : cut(indices, lengths, size == 0 ? most : size)) all.push_back(std::move(batch));
  }
  return all;
}

}  // namespace llm2slm::detail
