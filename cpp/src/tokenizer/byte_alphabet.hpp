// The characters that byte-level tokenizers write for bytes, so that every byte is a visible one.
#ifndef LLM2SLM_TOKENIZER_BYTE_ALPHABET_HPP
#define LLM2SLM_TOKENIZER_BYTE_ALPHABET_HPP

#include <array>

namespace llm2slm::detail::tokenizing {

constexpr bool is_visible_byte(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

/// The character of each byte: itself where it is visible, else the next one from U+0100 on.
constexpr std::array<char32_t, 256> make_byte_alphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte)
    alphabet[byte] = is_visible_byte(byte) ? static_cast<char32_t>(byte) : next++;
  return alphabet;
}

inline constexpr std::array<char32_t, 256> kByteAlphabet = make_byte_alphabet();
inline constexpr char32_t kByteAlphabetEnd = 0x144;

/// The byte of each character below kByteAlphabetEnd; -1 where it is none.
constexpr std::array<int, kByteAlphabetEnd> make_bytes_of_characters() {
  std::array<int, kByteAlphabetEnd> bytes{};
  for (int& byte : bytes) byte = -1;
  for (unsigned byte = 0; byte < 256; ++byte) bytes[kByteAlphabet[byte]] = static_cast<int>(byte);
  return bytes;
}

inline constexpr std::array<int, kByteAlphabetEnd> kBytesOfCharacters = make_bytes_of_characters();

}  // namespace llm2slm::detail::tokenizing

#endif
