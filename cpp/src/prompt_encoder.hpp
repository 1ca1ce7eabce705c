// The prompt encoder: from prompts' ids to an encoding, by the encoder and projector graphs. Text is not known here.
#ifndef LLM2SLM_PROMPT_ENCODER_HPP
#define LLM2SLM_PROMPT_ENCODER_HPP

#include <memory>
#include <vector>

#include "encoding.hpp"
#include "tokenization.hpp"

namespace llm2slm::detail {

/// A batch of prompts after the encoder: what the projectors of all heads read.
struct ReadPrompts {
  std::shared_ptr<Tensor> input_ids, mask, hidden;
  std::vector<std::size_t> prompt_tokens, dropped_tokens;
  Timings timings_ms;
};

/// Run the encoder on a batch of prompts, in their order.
ReadPrompts read_batch(const OrtBackend& backend, const Manifest& manifest, const std::vector<const PromptIds*>& prompts);

/// The encoding of a batch for the head that backend and manifest are of.
std::shared_ptr<const Encoding::Data> encoding_of(const ReadPrompts& read, const OrtBackend& backend, const Manifest& manifest);

}  // namespace llm2slm::detail

#endif
