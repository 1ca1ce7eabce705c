// Beam search: transformers' `_beam_search`, one step per call. Prompts are independent of each other.
#ifndef LLM2SLM_BEAM_SEARCH_HPP
#define LLM2SLM_BEAM_SEARCH_HPP

#include <functional>
#include <optional>
#include <vector>

#include "sampler.hpp"

namespace llm2slm::detail {

/// The decoder's next inputs: for each next row, the row of the last logits that it continues, and its token.
struct Advance {
  std::vector<std::size_t> rows;
  Ids ids;
};

/// A finished sequence. `score` is transformers' `sequences_scores`.
struct Hypothesis {
  Ids token_ids;
  FinishReason finish_reason = FinishReason::length;
  float score = -1e9F;
  std::vector<float> logprobs;
};

/// Grows `num_beams` sequences of every prompt at once, and keeps the best that finished.
class BeamSearch {
 public:
  /// options, special_ids: outlive it. prompts: the index of each prompt among all prompts; it draws from a stream of its own.
  /// stops: whether the text of token ids has a stop string in it; empty where there is none.
  BeamSearch(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens,
             const std::vector<std::size_t>& prompts, std::function<bool(const Ids&)> stops);

  /// The next step, or nothing when every prompt is finished. Finished prompts have no rows in it.
  ///
  /// logits: of the rows last returned; in the first call a row per prompt. Throws Error(usage): the options exclude every token.
  std::optional<Advance> advance(const Logits& logits, std::size_t vocab);

  /// Per prompt `num_return_sequences` hypotheses, best first. Where fewer finished, because options left no more sequences,
  /// the others are empty and score -1e9.
  std::vector<std::vector<Hypothesis>> results() const;

 private:
  // A beam with one more token.
  struct Candidate {
    std::size_t row = 0;
    std::int64_t id = 0;
    float total = 0, logprob = 0;
    bool stopped = false;
  };
  // A finished hypothesis. A place without one has the lowest score.
  struct Finished {
    float score = -1e9F;
    bool complete = false;
    std::optional<Hypothesis> hypothesis;
  };
  // An unfinished prompt.
  struct Open {
    std::size_t place = 0;
    std::vector<float> totals;  // [beams]
  };

  std::vector<Candidate> candidates(const Open& open, std::size_t first_row, std::size_t rows_per_prompt);
  std::vector<std::size_t> drawn(const std::vector<float>& totals, Random& random) const;
  void finish(std::size_t place, const std::vector<Candidate>& found, const std::vector<bool>& finished, std::size_t length);
  bool goes_on(std::size_t place, float best, std::size_t length) const;
  Hypothesis hypothesis(const Candidate& candidate, float score) const;
  float weight(std::size_t length) const;

  const ResolvedOptions& options_;
  const SpecialIds& special_ids_;
  std::size_t num_tokens_, beams_, count_;
  std::function<bool(const Ids&)> stops_;
  Processors processors_;
  std::vector<Random> randoms_;
  std::vector<Open> open_;
  std::vector<std::vector<float>> logprobs_;      // [rows][tokens]
  std::vector<std::vector<Finished>> finished_;  // [prompts][beams]
  std::vector<float> scores_;                    // [rows, num_tokens] of this step
};

}  // namespace llm2slm::detail

#endif
