// Manifests from anywhere are read or refused: nothing else happens. Once with their digest, which hardly any passes, and once
// without, so that what comes behind it is reached too.
//
//     build/fuzz/fuzz/fuzz_manifest build/fuzz/fuzz/corpus/manifest
#include <cstdint>

#include "encoding_identity.hpp"
#include "manifest.hpp"
#include "utf8.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using namespace llm2slm::detail;

template <typename Work>
void expect_bundle_error(Work&& work) {
  try {
    work();
  } catch (const llm2slm::Error& error) {
    if (error.code() != llm2slm::ErrorCode::bundle) __builtin_trap();
    if (invalid_utf8(error.what())) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  expect_bundle_error([&] { parse_manifest(text, "fuzzed"); });
  expect_bundle_error([&] {
    const Manifest manifest = parse_undigested(text, "fuzzed");
    EncodingIdentity::of(manifest).check(EncodingIdentity::of(manifest), "it");
  });
  return 0;
}
