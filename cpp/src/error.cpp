#include "error.hpp"

#include <sstream>

namespace llm2slm {

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

// Here, so that the type's identity is in the library and not in every program: it can be caught across that border.
Error::~Error() = default;

namespace detail {

Error failure(ErrorCode code, const std::string& fact, const std::vector<std::string>& evidence,
              const std::string& remedy) {
  std::ostringstream message;
  message << fact;
  for (const std::string& line : evidence) message << "\n  - " << line;
  message << "\n  → " << remedy;
  return Error(code, message.str());
}

}  // namespace detail
}  // namespace llm2slm
