// Rows whose next token is chosen one by one, by greedy search or sampling.
#ifndef LLM2SLM_SAMPLED_ROWS_HPP
#define LLM2SLM_SAMPLED_ROWS_HPP

#include "request_rows.hpp"
#include "response_text.hpp"
#include "sampler.hpp"

namespace llm2slm::detail {

/// The `num_return_sequences` responses to each prompt of a request. Finished rows leave.
class SampledRows : public RequestRows {
 public:
  explicit SampledRows(const Request& request);

  /// Throws Error: `bundle` (the logits are not finite), `usage` (the options leave a row without tokens).
  std::optional<Continuation> advance(const Positions& logits) override;
  const std::vector<Step>& last() const override { return last_; }
  std::vector<Generation> responses(const Timings& timings) const override;

 private:
  std::size_t count_;  // of each prompt
  Sampler sampler_;
  std::vector<ResponseText> texts_;
  // The running rows, and the encoding's row of each.
  std::vector<std::size_t> running_, sources_;
  std::vector<Step> last_;
};

}  // namespace llm2slm::detail

#endif
