#include "ngram_drafter.hpp"

#include <algorithm>

namespace llm2slm::detail {
namespace {

constexpr std::size_t kLongestNgram = 3;

}  // namespace

std::vector<DraftToken> NgramDrafter::draft(const Ids& ids, std::size_t most) {
  Ids known = prompt_;
  known.insert(known.end(), ids.begin(), ids.end());
  if (known.empty()) return {};
  std::vector<DraftToken> drafts;
  for (std::size_t size = std::min({kLongestNgram, ids.size(), known.size() - 1}); size > 0; --size) {
    const auto ngram = known.end() - static_cast<std::ptrdiff_t>(size), last = known.end() - 1;
    const auto found = std::find_end(known.begin(), last, ngram, known.end());
    if (found == last) continue;
    const auto next = found + static_cast<std::ptrdiff_t>(size);
    const auto count = std::min(most, static_cast<std::size_t>(known.end() - next));
    for (std::size_t i = 0; i < count; ++i) drafts.push_back({next[static_cast<std::ptrdiff_t>(i)], {}, 0});
    break;
  }
  return drafts;
}

}  // namespace llm2slm::detail
