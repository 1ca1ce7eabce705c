// How tokens become text again.
#ifndef LLM2SLM_TOKENIZER_DECODER_HPP
#define LLM2SLM_TOKENIZER_DECODER_HPP

#include <memory>
#include <string>
#include <vector>

#include "document.hpp"

namespace llm2slm::detail::tokenizing {

/// A decoder of a tokenizer.json; any number of threads may use one.
class Decoder {
 public:
  virtual ~Decoder() = default;
  /// Change tokens, in the end to strings that join to the text.
  ///
  /// Throws Error(bundle) for tokens on which Python fails too.
  virtual void decode(std::vector<std::string>& tokens) const = 0;

  /// Throws Error(bundle) for one that is not known here.
  static std::unique_ptr<Decoder> read(const Part& part);

 protected:
  Decoder() = default;
  Decoder(const Decoder&) = default;
  Decoder& operator=(const Decoder&) = default;
};

}  // namespace llm2slm::detail::tokenizing

#endif
