#include "byte_trie.hpp"

#include <algorithm>

namespace llm2slm::detail::tokenizing {

ByteTrie::ByteTrie(std::vector<std::pair<std::string_view, std::uint32_t>> entries) {
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  // Nodes in the order of their depth; each with the entries that begin with its path. Not recursive: entries may be
  // long.
  struct Open {
    std::uint32_t node;
    std::size_t begin, end, depth;
  };
  nodes_.emplace_back();
  std::vector<Open> open = {{0, 0, entries.size(), 0}};
  for (std::size_t next = 0; next < open.size(); ++next) {
    const Open at = open[next];
    std::size_t i = at.begin;
    for (; i < at.end && entries[i].first.size() == at.depth; ++i)
      if (at.depth > 0) nodes_[at.node].value = entries[i].second;
    nodes_[at.node].children = static_cast<std::uint32_t>(nodes_.size());
    while (i < at.end) {
      const char label = entries[i].first[at.depth];
      std::size_t end = i;
      while (end < at.end && entries[end].first[at.depth] == label) ++end;
      const auto node = static_cast<std::uint32_t>(nodes_.size());
      nodes_.emplace_back();
      nodes_.back().label = static_cast<unsigned char>(label);
      ++nodes_[at.node].count;
      if (at.node == 0) roots_[static_cast<unsigned char>(label)] = node;
      open.push_back({node, i, end, at.depth + 1});
      i = end;
    }
  }
}

}  // namespace llm2slm::detail::tokenizing
