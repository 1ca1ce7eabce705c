// Files of encodings from anywhere are read or refused: nothing else happens. Once with their checksum, which hardly any passes,
// and once without, so that what comes behind it is reached too.
//
//     LLM2SLM_FUZZ_BUNDLE=../engines/demo build/fuzz/fuzz/fuzz_encoding build/fuzz/fuzz/corpus/encoding
//
// The bundle is the one that the corpus was encoded with; nothing of it but the manifest is read.
#include <cstdint>
#include <cstdlib>

#include "encoding_file.hpp"
#include "manifest.hpp"
#include "utf8.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using namespace llm2slm::detail;

// The sum of every byte that was promised: reading beyond the file is what a sanitizer sees.
std::uint64_t touched(const TensorView& view) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < view.bytes; ++i) sum += static_cast<const std::uint8_t*>(view.data)[i];
  return sum;
}

template <typename Work>
void expect_encoding_error(Work&& work) {
  try {
    work();
  } catch (const llm2slm::Error& error) {
    if (error.code() != llm2slm::ErrorCode::encoding) __builtin_trap();
    if (invalid_utf8(error.what())) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Manifest manifest = read_manifest(std::getenv("LLM2SLM_FUZZ_BUNDLE"));
  const std::string_view content(reinterpret_cast<const char*>(data), size);
  std::uint64_t sum = 0;
  expect_encoding_error([&] { parse_tensors(content, "fuzzed"); });
  expect_encoding_error([&] {
    const EncodingContent read = check_encoding(parse_layout(content, "fuzzed"), "fuzzed", manifest);
    sum += touched(read.input_ids);
    for (const auto& [name, view] : read.conditioning) sum += touched(view);
  });
  return sum == 1 ? -1 : 0;
}
