// The beams of prompts.
#ifndef LLM2SLM_BEAM_ROWS_HPP
#define LLM2SLM_BEAM_ROWS_HPP

#include "beam_search.hpp"
#include "request_rows.hpp"

namespace llm2slm::detail {

/// The beams of each prompt of a request.
class BeamRows : public RequestRows {
 public:
  explicit BeamRows(const Request& request);

  /// Throws Error: `bundle` (the logits are not finite), `usage` (the options leave a beam without tokens).
  std::optional<Continuation> advance(const Positions& logits) override;
  const std::vector<Step>& last() const override { return none_; }
  /// The best responses to each prompt, best first.
  std::vector<Generation> responses(const Timings& timings) const override;

 private:
  BeamSearch search_;
  std::vector<std::size_t> sources_;  // [rows] the encoding's row of each beam
  std::vector<Step> none_;
};

}  // namespace llm2slm::detail

#endif
