// A regular expression with Oniguruma's rules for Ruby, taken apart into sets of code points and what joins them.
#ifndef LLM2SLM_TOKENIZER_EXPRESSION_HPP
#define LLM2SLM_TOKENIZER_EXPRESSION_HPP

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "document.hpp"
#include "unicode.hpp"

namespace llm2slm::detail::tokenizing {

/// In the order they are written: syntax that PCRE2 reads the same way, or the index of a set that one code point is
/// in.
struct Expression {
  std::vector<std::variant<std::string, std::size_t>> parts;
  std::vector<Ranges> sets;
};

/// Throws Error(bundle) for syntax that is wrong or not supported here, with the expression and the place.
Expression parse_expression(std::string_view expression, const Part& where);

}  // namespace llm2slm::detail::tokenizing

#endif
