// Strings found as prefixes of a text.
#ifndef LLM2SLM_TOKENIZER_BYTE_TRIE_HPP
#define LLM2SLM_TOKENIZER_BYTE_TRIE_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace llm2slm::detail::tokenizing {

/// A trie over bytes, each entry with a value.
class ByteTrie {
 public:
  ByteTrie() = default;
  /// Of equal strings the last one counts. The strings are not kept.
  explicit ByteTrie(std::vector<std::pair<std::string_view, std::uint32_t>> entries);

  /// Calls `found(length, value)` for every entry that is a prefix of the text, from short to long.
  template <typename Found>
  void prefixes(std::string_view text, Found found) const {
    std::uint32_t node = 0;
    for (std::size_t length = 0; length < text.size();) {
      node = child(node, static_cast<unsigned char>(text[length]));
      if (node == 0) return;
      ++length;
      if (nodes_[node].value != kNone) found(length, nodes_[node].value);
    }
  }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;
  // The children of a node lie together, in the order of their labels.
  struct Node {
    std::uint32_t children = 0, value = kNone;
    std::uint16_t count = 0;
    unsigned char label = 0;
  };

  std::uint32_t child(std::uint32_t node, unsigned char label) const {
    if (node == 0) return roots_[label];
    std::uint32_t low = nodes_[node].children, high = low + nodes_[node].count;
    while (low < high) {
      const std::uint32_t middle = low + (high - low) / 2;
      if (nodes_[middle].label < label)
        low = middle + 1;
      else
        high = middle;
    }
    return low < nodes_[node].children + nodes_[node].count && nodes_[low].label == label ? low : 0;
  }

  std::vector<Node> nodes_;
  // The children of the root, which every search begins with.
  std::array<std::uint32_t, 256> roots_{};
};

}  // namespace llm2slm::detail::tokenizing

#endif
