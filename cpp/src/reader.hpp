// The encoder's half of a pair: from prompts' ids to an encoding. It knows no text and writes no token.
#ifndef LLM2SLM_READER_HPP
#define LLM2SLM_READER_HPP

#include <memory>
#include <vector>

#include "encoding_data.hpp"
#include "prompt_ids.hpp"

namespace llm2slm::detail {

/// The encoding of a batch of prompts, in their order.
std::shared_ptr<const Encoding::Data> read_batch(const Graphs& graphs, const Manifest& manifest,
                                                 const std::vector<const PromptIds*>& prompts);

}  // namespace llm2slm::detail

#endif
