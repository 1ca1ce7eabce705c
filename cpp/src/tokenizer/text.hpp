// A piece of text as it is changed, with the little that must be known of where it came from.
#ifndef LLM2SLM_TOKENIZER_TEXT_HPP
#define LLM2SLM_TOKENIZER_TEXT_HPP

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace llm2slm::detail::tokenizing {

/// One code point of a new text and what it stands for in the old one: 1, it is added; 0, it replaces the next code
/// point; -n, it replaces the next code point and the n behind it are removed.
struct Change {
  char32_t point;
  int change;
};

/// What a pattern found: bytes [begin, end), which it matched or not.
struct Match {
  std::size_t begin, end;
  bool matched;
};

/// Throws Error(bundle) for a size that a tokenizer gets to only by making text longer over and over.
void check_length(std::size_t size);

/// What becomes of the delimiters a text is split at.
enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

/// Text whose bytes may remember whether they come from the very beginning of the original. Metaspace asks for that of
/// a piece with the scheme "first"; for other tokenizers it is not tracked.
class Text {
 public:
  Text(std::string_view original, bool tracked);

  const std::string& str() const { return text_; }
  bool empty() const { return text_.empty(); }
  bool tracked() const { return tracked_; }
  /// Whether this piece begins where the original does; only where it is tracked.
  bool at_start() const { return at_start_; }

  /// Replace all of the text. initial_removed: code points removed before the first change.
  void transform(const std::vector<Change>& changes, std::size_t initial_removed);
  /// Replace all of an untracked text.
  void assign(std::string text);
  /// Put text before it; an empty one stays empty.
  void prepend(std::string_view text);
  /// Replace what was matched by the same content.
  void replace(const std::vector<Match>& matches, std::string_view content);
  /// A part, by bytes.
  Text slice(std::size_t begin, std::size_t end) const;

 private:
  Text() = default;

  std::string text_;
  // A byte per byte of the text: whether it comes from the beginning of the original.
  std::vector<char> starts_;
  bool tracked_ = false, at_start_ = true;
};

/// A piece of a text: what is left to tokenize, or an added token that was found.
struct Piece {
  Text text;
  std::optional<std::uint32_t> token;
};
using Pieces = std::vector<Piece>;

/// Replace every piece that is no token by those that `split(text, into)` makes of it, leaving out empty ones.
template <typename Split>
void split_pieces(Pieces& pieces, Split split) {
  Pieces result;
  result.reserve(pieces.size());
  for (Piece& piece : pieces) {
    if (piece.token) {
      result.push_back(std::move(piece));
      continue;
    }
    split(std::move(piece.text), result);
  }
  pieces = std::move(result);
}

/// Append a piece unless it is empty.
inline void add_piece(Pieces& into, Text&& text, std::optional<std::uint32_t> token = std::nullopt) {
  if (!text.empty()) into.push_back({std::move(text), token});
}

/// Append the parts of a text between and around what a pattern matched.
void split_at(const Text& text, std::vector<Match> matches, Behavior behavior, Pieces& into);

/// Every code point for which `test` holds, and what lies between them.
template <typename Test>
std::vector<Match> matches_of(std::string_view text, Test test);

}  // namespace llm2slm::detail::tokenizing

#include "code_points.hpp"

namespace llm2slm::detail::tokenizing {

template <typename Test>
std::vector<Match> matches_of(std::string_view text, Test test) {
  std::vector<Match> matches;
  std::size_t last = 0;
  for_each_code_point(text, [&](char32_t point, std::size_t offset, std::size_t length) {
    if (!test(point)) return;
    if (last < offset) matches.push_back({last, offset, false});
    last = offset + length;
    matches.push_back({offset, last, true});
  });
  if (last < text.size()) matches.push_back({last, text.size(), false});
  return matches;
}

}  // namespace llm2slm::detail::tokenizing

#endif
