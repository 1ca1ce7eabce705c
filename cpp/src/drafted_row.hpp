// A row whose tokens are drafted, and verified several in one decoder call.
#ifndef LLM2SLM_DRAFTED_ROW_HPP
#define LLM2SLM_DRAFTED_ROW_HPP

#include <functional>
#include <memory>

#include "draft_length.hpp"
#include "drafter.hpp"
#include "request_rows.hpp"
#include "response_text.hpp"
#include "sampler.hpp"

namespace llm2slm::detail {

/// What a row's draws are for, besides plain sampling.
enum class Draw : std::uint64_t { accept = 1, redraw = 2, draft = 3 };

/// A row's draws for a purpose. request: with a seed if it samples.
Draws draws_of(const Request& request, std::size_t row, Draw purpose);

/// The response to one prompt of a request, which feeds drafts.
///
/// Without `defer`, greedy search and drafts that were not drawn give the tokens that they give without drafts. Drawn drafts give tokens
/// with the distribution that they have without drafts, and a seed gives the same tokens for every length of the drafts.
class DraftedRow : public RequestRows {
 public:
  /// row: of the request's encoding. drafter: makes what proposes tokens, at the first draft. length: chooses how many. defer: drafts
  /// with at least this confidence are accepted without the verifier; nothing: none are.
  DraftedRow(const Request& request, std::size_t row, std::function<std::unique_ptr<Drafter>()> drafter, DraftLength length,
             std::optional<double> defer);

  std::size_t room() const override { return unfed_ + draft_room(); }
  /// Decide the drafts that were fed and the token after them, and draft the next ones.
  ///
  /// logits: of the first ids of the last continuation; of no token if it had none.
  ///
  /// Throws Error: `bundle` (the logits are not finite), `usage` (the options leave the row without tokens).
  std::optional<Continuation> advance(const Positions& logits) override;
  void add_call(double ms) override { ms_ += ms; }
  const std::vector<Step>& last() const override { return last_; }
  std::vector<Generation> responses(const Timings& timings) const override;

 private:
  std::optional<Continuation> advanced(const Positions& logits);
  std::size_t draft_room() const;
  std::vector<DraftToken> drafts(std::size_t most);
  std::optional<DraftToken> next_draft();
  std::int64_t decide(const float* logits, const DraftToken* draft);
  void emit(std::int64_t id, std::optional<float> logprob);
  bool finished() const { return !last_.empty() && last_.back().finish_reason; }
  std::optional<Continuation> draft(std::size_t rejected);
  Continuation feed(std::size_t rejected) const;

  std::size_t row_;
  std::function<std::unique_ptr<Drafter>()> make_drafter_;
  std::unique_ptr<Drafter> drafter_;
  DraftLength length_;
  bool defers_;
  double confident_;
  Sampler sampler_;
  Draws accepts_, redraws_;
  ResponseText text_;
  Ids ids_;                        // the response
  std::size_t unfed_ = 0;          // the response's last ids that the verifier has not been fed
  std::vector<DraftToken> block_;  // drafts that are not decided
  std::size_t drafted_ = 0, accepted_ = 0;
  double ms_ = 0;  // of decoder calls and drafts, after the prompt pass
  std::vector<Step> last_;
};

}  // namespace llm2slm::detail

#endif
