// SHA-256 (FIPS 180-4), a piece at a time: what a bundle's files and encodings are checked with. It is OpenSSL's where the build
// found it, which uses the processor's SHA instructions, and our own otherwise.
#ifndef LLM2SLM_SHA256_HPP
#define LLM2SLM_SHA256_HPP

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace llm2slm::detail {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void update(const void* data, std::size_t size);
  void update(std::string_view text) { update(text.data(), text.size()); }
  /// The digest of all that was given, 64 hexadecimal digits. The last call.
  std::string hex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whose code the library was built to hash with: `openssl` or `own`.
const char* sha256_provider();

std::string sha256(std::string_view text);

}  // namespace llm2slm::detail

#endif
