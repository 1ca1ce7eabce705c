// UTF-8: validation, and Python's properties of text.
#ifndef LLM2SLM_UTF8_HPP
#define LLM2SLM_UTF8_HPP

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace llm2slm::detail {

/// The offset of the first byte that is not part of well-formed UTF-8; nothing where all is.
std::optional<std::size_t> invalid_utf8(std::string_view bytes);

/// Whether a well-formed sequence begins at an offset within `bytes`.
bool well_formed_at(std::string_view bytes, std::size_t offset);

/// The code point at an offset of well-formed UTF-8, and the offset moved behind it.
char32_t next_code_point(std::string_view text, std::size_t& offset);

/// Whether Python's `text.strip()` leaves nothing.
bool is_blank(std::string_view text);

/// Python's `text.isprintable()`.
bool is_printable(std::string_view text);

/// The first character that a terminal obeys, as Python's `ascii` writes it: a control character, or one that changes the direction
/// of text. Spaces of all kinds, tabs and line breaks are none.
std::optional<std::string> first_obeyed(std::string_view text);

/// Python's `len(text)`.
std::size_t code_point_count(std::string_view text);
/// Python's `text.strip()`.
std::string_view stripped(std::string_view text);

/// The offset behind the first `count` code points; the end where there are no more.
std::size_t end_of_code_points(std::string_view text, std::size_t count);


/// Python's `repr(text)`.
std::string python_repr(std::string_view text);

}  // namespace llm2slm::detail

#endif
