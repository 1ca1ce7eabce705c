// The number of tokens to draft, from how many were accepted and from what calls of the decoder cost.
#ifndef LLM2SLM_DRAFT_LENGTH_HPP
#define LLM2SLM_DRAFT_LENGTH_HPP

#include "call_costs.hpp"

namespace llm2slm::detail {

/// Chooses the number of tokens of a row's next draft, if the row is drafted at all.
class DraftLength {
 public:
  /// costs: outlives it. fixed: this many tokens always; nothing: adapted. least: the smallest number chosen.
  DraftLength(CallCosts& costs, std::optional<std::size_t> fixed, std::size_t least);

  /// Record that `accepted` of `drafted` tokens were accepted. The tokens behind a rejected one do not count.
  void add(std::size_t drafted, std::size_t accepted);
  /// The number of tokens to draft next; 0: none.
  std::size_t choose();
  /// Record the response's tokens, and the milliseconds of its calls and drafts without the prompt pass.
  void finish(std::size_t tokens, double ms);

 private:
  std::size_t best(std::optional<double> plain) const;

  CallCosts& costs_;
  std::optional<std::size_t> fixed_;
  std::size_t least_;
  // A fixed number is what was asked for; where at least one token is always drafted, drafts decide the tokens.
  bool is_timed_;
  bool may_draft_, has_drafted_ = false;
  CallCosts::Sums own_;
};

}  // namespace llm2slm::detail

#endif
