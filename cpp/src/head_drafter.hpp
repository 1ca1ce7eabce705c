// A pair's head as the drafter for another head: the SLM drafts, the LLM verifies.
#ifndef LLM2SLM_HEAD_DRAFTER_HPP
#define LLM2SLM_HEAD_DRAFTER_HPP

#include <memory>

#include "call_costs.hpp"
#include "drafter.hpp"
#include "request.hpp"
#include "sampler.hpp"

namespace llm2slm::detail {

/// Drafts one response with a head of its own.
class HeadDrafter : public Drafter {
 public:
  /// request: with the drafting head's manifest. row: the index of the prompt among the request's. state: of this prompt alone. costs:
  /// records what drafts cost; outlives it. least_confidence: a draft with less confidence is the last of its block.
  HeadDrafter(const Request& request, std::size_t row, std::unique_ptr<DecoderState> state, CallCosts& costs,
              double least_confidence);

  /// Each draft is the head's own choice after those before it.
  std::vector<DraftToken> draft(const Ids& ids, std::size_t most) override;

 private:
  void catch_up(const Ids& ids);
  void feed(const Ids& ids);
  void read(const Positions& logits);
  DraftToken choose(std::size_t index);
  void append(std::int64_t id);

  Request request_;
  std::unique_ptr<DecoderState> state_;
  CallCosts& costs_;
  double least_confidence_;
  Sampler sampler_;
  Draws draws_;
  std::vector<float> logits_;  // [vocab] of the token after the fed ones
  std::size_t start_ = 0, most_ = 0;
  // The ids that the state was fed, and those that the sampler has.
  Ids fed_, chosen_;
};

}  // namespace llm2slm::detail

#endif
