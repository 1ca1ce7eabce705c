#include "error.hpp"

#include <cstdio>

#include "utf8.hpp"

namespace llm2slm {

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

// Out of line: the type's identity is in the library, so that programs can catch it across the library's border.
Error::~Error() = default;

namespace detail {
namespace {

// Control characters and characters that change the text direction: a terminal obeys them instead of showing them.
bool obeyed(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c <= 0x9f) || (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
}

std::string escape(char32_t c) {
  char text[8];
  std::snprintf(text, sizeof text, c <= 0xff ? "\\x%02x" : "\\u%04x", static_cast<unsigned>(c));
  return text;
}

}  // namespace

std::string printable(std::string_view text) {
  std::string shown;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    const bool whole = well_formed_at(text, at);
    const char32_t c = next_code_point(text, at);
    if (whole && !obeyed(c)) {
      shown.append(text, start, at - start);
    } else {
      shown += escape(c);
    }
  }
  return shown;
}

Error failure(ErrorCode code, const std::string& fact, const std::vector<std::string>& evidence,
              const std::string& remedy) {
  std::string message = printable(fact);
  for (const std::string& line : evidence) message += "\n  - " + printable(line);
  return Error(code, message + "\n  → " + printable(remedy));
}

std::vector<std::string> listed(std::vector<std::string> reasons) {
  constexpr std::size_t most = 5;
  if (reasons.size() > most) {
    const std::size_t more = reasons.size() - most;
    reasons.resize(most);
    reasons.push_back("and " + std::to_string(more) + " more");
  }
  return reasons;
}

}  // namespace detail
}  // namespace llm2slm
