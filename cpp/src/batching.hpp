// Batching: prompts of similar length run together, to keep padding small. Only lengths are known here.
#ifndef LLM2SLM_BATCHING_HPP
#define LLM2SLM_BATCHING_HPP

#include <cstddef>
#include <vector>

namespace llm2slm::detail {

/// The prompt indices of each batch. Every prompt is in exactly one.
///
/// lengths: tokens of each prompt. size: maximum prompts per batch; 0: no limit.
std::vector<std::vector<std::size_t>> batches(const std::vector<std::size_t>& lengths, std::size_t size);

}  // namespace llm2slm::detail

#endif
