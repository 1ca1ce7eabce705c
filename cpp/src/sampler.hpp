// The sampler: chooses the next token of each row, greedily or at random. Rows are independent of each other.
#ifndef LLM2SLM_SAMPLER_HPP
#define LLM2SLM_SAMPLER_HPP

#include <utility>
#include <vector>

#include "logits_processors.hpp"
#include "random.hpp"

namespace llm2slm::detail {

/// Scores of the next token, [rows] each [vocab]; the runtime owns the memory.
using Logits = std::vector<const float*>;

/// The seed of a call without one.
std::uint64_t fresh_entropy();

class Sampler {
 public:
  /// options, special_ids: outlive it. num_tokens: how many ids the tokenizer has; others are never chosen.
  /// rows: of each row, the index of its prompt among all prompts and of the sequence among those of its prompt. A row draws
  /// from a stream of its own, so borders and order of batches change nothing.
  Sampler(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens,
          const std::vector<std::pair<std::size_t, std::size_t>>& rows);

  /// The next id of each row. Throws Error(usage): the options leave a row no token.
  Ids choose(const Logits& logits);
  /// The log-probability of each id just chosen, under the processed scores; empty without `output_scores`.
  const std::vector<float>& logprobs() const { return logprobs_; }
  /// Keep only these rows.
  void keep(const std::vector<std::size_t>& rows);

 private:
  std::int64_t draw(const std::vector<float>& scores, Random& random);

  const ResolvedOptions& options_;
  std::size_t num_tokens_;
  Processors processors_;
  std::vector<Random> randoms_;
  std::vector<float> logprobs_, scores_, work_;
};

}  // namespace llm2slm::detail

#endif
