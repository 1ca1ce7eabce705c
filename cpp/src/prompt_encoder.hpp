// The prompt encoder: from prompts' ids to an encoding, by the encoder and projector graphs. Text is not known here.
#ifndef LLM2SLM_PROMPT_ENCODER_HPP
#define LLM2SLM_PROMPT_ENCODER_HPP

#include <memory>
#include <vector>

#include "encoding.hpp"
#include "tokenization.hpp"

namespace llm2slm::detail {

/// The encoding of a batch of prompts, in their order.
std::shared_ptr<const Encoding::Data> encode_batch(const OrtBackend& backend, const Manifest& manifest,
                                                   const std::vector<const PromptIds*>& prompts);

}  // namespace llm2slm::detail

#endif
