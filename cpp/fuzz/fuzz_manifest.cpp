// Manifests from anywhere are read or refused: nothing else happens.
//
//     fuzz_manifest corpus/manifest
#include <cstdint>

#include "identity.hpp"
#include "manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace llm2slm::detail;
  try {
    const Manifest manifest = parse_manifest({reinterpret_cast<const char*>(data), size}, "fuzzed");
    EncodingIdentity::of(manifest).check(EncodingIdentity::of(manifest), "it");
  } catch (const llm2slm::Error& error) {
    if (error.code() != llm2slm::ErrorCode::bundle) __builtin_trap();
  }
  return 0;
}
