// Everything an encoding depends on besides its prompts, as sha256: two pairs that agree make the same encodings.
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
  /// Refuse what was made with another identity. what: the thing that has it, to begin a sentence with.
  ///
  /// Throws Error(encoding): naming everything that differs.
  void check(const EncodingIdentity& other, const std::string& what) const;
};

}  // namespace llm2slm::detail

#endif
