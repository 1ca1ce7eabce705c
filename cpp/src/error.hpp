// Error messages: fact, evidence, remedy.
#ifndef LLM2SLM_ERROR_HPP
#define LLM2SLM_ERROR_HPP

#include <string>
#include <string_view>
#include <vector>

#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

/// Text as one line of valid UTF-8. Invalid bytes, control characters and characters that change the text direction are escaped,
/// as `\xff`. For text from files and paths.
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
