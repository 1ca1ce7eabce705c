// The identity of a pair's encodings: sha256 of everything they depend on besides the prompts.
#ifndef LLM2SLM_ENCODING_IDENTITY_HPP
#define LLM2SLM_ENCODING_IDENTITY_HPP

#include <string>

#include "manifest.hpp"

namespace llm2slm::detail {

/// encoder, projector: their graphs' files. tokenizer: the LLM's tokenizer and the prompt template.
struct EncodingIdentity {
  std::string encoder, projector, tokenizer;

  /// The identity of a head's encodings.
  static EncodingIdentity of(const Manifest& manifest);
  /// Refuse another identity. what: its owner, as the subject of a sentence.
  ///
  /// Throws Error(encoding): names every difference.
  void check(const EncodingIdentity& other, const std::string& what) const;
};

}  // namespace llm2slm::detail

#endif
