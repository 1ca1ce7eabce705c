// SHA-256 (FIPS 180-4) in C++ alone: what Sha256 runs where OpenSSL is not there.
#ifndef LLM2SLM_OWN_SHA256_HPP
#define LLM2SLM_OWN_SHA256_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace llm2slm::detail {

class OwnSha256 {
 public:
  void update(const void* data, std::size_t size);
  /// The digest of all that was given, 64 hexadecimal digits. The last call.
  std::string hex();

 private:
  void block(const std::uint8_t* data);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> held_{};
  std::uint64_t size_ = 0;
};

}  // namespace llm2slm::detail

#endif
