// What Python's `tokenizers` knows of a code point. Its crates follow different versions of Unicode, so each property
// is the one of the component that asks; tools/unicode_tables.py reads them from the library.
#ifndef LLM2SLM_TOKENIZER_UNICODE_HPP
#define LLM2SLM_TOKENIZER_UNICODE_HPP

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace llm2slm::detail::tokenizing {

/// White space of WhitespaceSplit, Strip, Whitespace and added tokens.
bool is_space(char32_t point);
/// `\w` of Whitespace and of added tokens that are single words.
bool is_word(char32_t point);
/// Numeric characters of Digits.
bool is_numeric(char32_t point);
/// Punctuation of Punctuation and BertPreTokenizer.
bool is_punctuation(char32_t point);
/// What BertNormalizer removes as text that is not clean.
bool is_unclean(char32_t point);
/// Nonspacing marks, which BertNormalizer removes as accents.
bool is_nonspacing(char32_t point);
/// Marks, which StripAccents removes.
bool is_mark(char32_t point);

/// The lower case of a code point that has one of one code point; U+0130, which has two, is left to the caller.
char32_t lower(char32_t point);

/// Canonical_Combining_Class.
std::uint8_t combining_class(char32_t point);
/// Append the full decomposition of a code point.
void decompose(char32_t point, bool compatible, std::vector<char32_t>& into);
/// The primary composite of two code points; 0 where there is none.
char32_t compose(char32_t first, char32_t second);

/// The offset behind the extended grapheme cluster that begins at an offset of well-formed UTF-8.
std::size_t end_of_cluster(std::string_view text, std::size_t offset);

/// A set of code points, as inclusive ranges.
using Ranges = std::vector<std::pair<char32_t, char32_t>>;

/// What `\p{name}` of a regular expression stands for: a general category of one or two letters, or a script. Empty
/// where the name is not known.
Ranges property(std::string_view name);
/// `\w` and `\s` of a regular expression.
Ranges pattern_word();
Ranges pattern_space();

}  // namespace llm2slm::detail::tokenizing

#endif
