// Any bytes as a tokenizer.json, and text through what they describe: an Error, or ids, but no crash and no endless
// loop.
//
//     build/fuzz/fuzz/fuzz_tokenizer -max_len=8192 build/fuzz/fuzz/corpus/tokenizer
//
// Text behind a NUL in the input is encoded too.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "llm2slm/llm2slm.hpp"
#include "tokenizer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using llm2slm::detail::Tokenizer;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = input.find('\0');
  const std::string_view json = input.substr(0, end);
  const std::string_view own = end == std::string_view::npos ? std::string_view() : input.substr(end + 1);
  std::shared_ptr<const Tokenizer> tokenizer;
  try {
    tokenizer = Tokenizer::parse(json, "input");
  } catch (const llm2slm::Error&) {
    return 0;
  }
  constexpr std::string_view kText =
      " Hello,  w\xC3\xB6rld's 12345 <s>a</s>\r\n\t\xE6\x97\xA5\xE6\x9C\xAC e\xCC\x81\xCC\xA3 "
      "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x92\xBB \xEF\xAC\x81";
  for (const std::string_view text : {std::string_view(), kText, own}) {
    try {
      const llm2slm::detail::Encoded encoded = tokenizer->encode(text);
      static_cast<void>(tokenizer->decode(encoded.ids));
    } catch (const llm2slm::Error&) {
    }
  }
  try {
    static_cast<void>(tokenizer->decode({0, 1, 2, 3, 4, 5, 6, 7, 258, static_cast<std::int64_t>(tokenizer->size())}));
  } catch (const llm2slm::Error&) {
  }
  return 0;
}
