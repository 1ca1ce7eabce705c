// The sampler: chooses the next token of each row, greedily or at random. Rows are independent of each other.
#ifndef LLM2SLM_SAMPLER_HPP
#define LLM2SLM_SAMPLER_HPP

#include <utility>
#include <vector>

#include "draws.hpp"
#include "logits.hpp"
#include "logits_processors.hpp"

namespace llm2slm::detail {

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
  /// The processed scores [num_tokens] of a row's next token, valid until the next call. Throws as `choose`.
  const std::vector<float>& scores(std::size_t row, const float* logits);
  /// Append an id of each row.
  void accept(const Ids& ids) { processors_.append(ids); }
  /// Forget all ids but each row's first `tokens`.
  void truncate(std::size_t tokens) { processors_.truncate(tokens); }
  /// The log-probability of each id just chosen, under the processed scores; empty without `output_scores`.
  const std::vector<float>& logprobs() const { return logprobs_; }
  /// Keep only these rows.
  void keep(const std::vector<std::size_t>& rows);

 private:
  const ResolvedOptions& options_;
  std::size_t num_tokens_;
  Processors processors_;
  std::vector<Draws> draws_;
  std::vector<float> logprobs_, scores_, work_;
};

/// The log-probability of an id, by scores [num_tokens].
float logprob_of(std::int64_t id, std::vector<float> scores);

}  // namespace llm2slm::detail

#endif
