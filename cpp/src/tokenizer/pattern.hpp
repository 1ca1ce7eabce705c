// The regular expressions of Split, Replace and ByteLevel, which the library runs with Oniguruma.
#ifndef LLM2SLM_TOKENIZER_PATTERN_HPP
#define LLM2SLM_TOKENIZER_PATTERN_HPP

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "document.hpp"
#include "text.hpp"

namespace llm2slm::detail::tokenizing {

/// What text is searched for: a string, or a regular expression.
///
/// A regular expression is read with Oniguruma's rules for Ruby and Unicode, and every character of it becomes a set of
/// code points. Code points that no set tells apart are one class, and the expression is compiled by PCRE2 over bytes
/// that are numbers of classes; text becomes such bytes before it is searched. So the properties are those of the
/// library, whatever version of Unicode PCRE2 follows. Syntax on which the two might differ is refused.
class Pattern {
 public:
  /// A `{"String": …}` or `{"Regex": …}` of the document. Throws Error(bundle) for one that is not supported.
  static Pattern read(const Part& pattern);
  /// A regular expression; `where` is for messages.
  static Pattern regex(std::string_view expression, const Part& where);

  /// The matches in a text, one after another, and what lies between them; together they are the whole text.
  ///
  /// Throws Error(bundle) where the search needs too much memory.
  std::vector<Match> matches(std::string_view text) const;

  /// Whether it may match where there is nothing.
  bool may_be_empty() const { return may_be_empty_; }

 private:
  struct Code;
  Pattern() = default;
  std::uint8_t class_of(char32_t point) const;

  std::string literal_;
  std::shared_ptr<const Code> code_;
  // First code points of the ranges of one class, and the classes; the classes of ASCII again.
  std::vector<char32_t> bounds_;
  std::vector<std::uint8_t> classes_;
  std::array<std::uint8_t, 128> ascii_{};
  bool may_be_empty_ = false;
};

}  // namespace llm2slm::detail::tokenizing

#endif
