// How the messages of errors are made: the fact, the evidence, what to do next.
#ifndef LLM2SLM_ERROR_HPP
#define LLM2SLM_ERROR_HPP

#include <string>
#include <vector>

#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

/// An Error with a message made for the person who reads it.
///
/// fact: what happened, one sentence, with the value at fault in it. evidence: every reason found, one line each. remedy:
/// what to change next.
Error failure(ErrorCode code, const std::string& fact, const std::vector<std::string>& evidence,
              const std::string& remedy);

}  // namespace llm2slm::detail

#endif
