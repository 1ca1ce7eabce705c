// Which prompts run together: those of similar length, so that little of a batch is padding. It knows lengths only.
#ifndef LLM2SLM_BATCHING_HPP
#define LLM2SLM_BATCHING_HPP

#include <cstddef>
#include <vector>

namespace llm2slm::detail {

/// The indices of each batch; every prompt is in one.
///
/// lengths: tokens of each prompt. size: most prompts in a batch; 0: any number.
std::vector<std::vector<std::size_t>> batches(const std::vector<std::size_t>& lengths, std::size_t size);

}  // namespace llm2slm::detail

#endif
