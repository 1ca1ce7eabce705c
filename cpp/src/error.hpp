// How the messages of errors are made: the fact, the evidence, what to do next.
#ifndef LLM2SLM_ERROR_HPP
#define LLM2SLM_ERROR_HPP

#include <string>
#include <string_view>
#include <vector>

#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

/// A text as valid UTF-8 of one line: bytes that are none, control characters and what turns the direction of text are escaped, as
/// `\xff`. For whatever comes from a file or a name.
std::string printable(std::string_view text);

/// An Error with a message made for the person who reads it.
///
/// fact: what happened, one sentence, with the value at fault in it. evidence: every reason found, one line each. remedy:
/// what to change next. All of them are made printable here.
Error failure(ErrorCode code, const std::string& fact, const std::vector<std::string>& evidence,
              const std::string& remedy);

/// The first few of many reasons, and how many more there are.
std::vector<std::string> listed(std::vector<std::string> reasons);

}  // namespace llm2slm::detail

#endif
