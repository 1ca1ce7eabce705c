// Drafted rows of a batch: by prompt lookup, or with the pair as the drafter for another head.
#ifndef LLM2SLM_DRAFTING_HPP
#define LLM2SLM_DRAFTING_HPP

#include "drafted_row.hpp"

namespace llm2slm::detail {

/// How the rows of a batch are drafted.
class Drafting {
 public:
  /// Makes the drafter of a request's row. A draft with less than the confidence is the last of its block.
  using MakeDrafter = std::function<std::unique_ptr<Drafter>(const Request&, std::size_t row, double least_confidence)>;

  /// costs: what calls of this verifier and this drafter cost; outlives it.
  Drafting(DraftOptions options, CallCosts& costs, MakeDrafter drafter)
      : options_(std::move(options)), costs_(costs), drafter_(std::move(drafter)) {}

  /// The drafted rows of a request, one per prompt. Request and this outlive them.
  std::vector<std::unique_ptr<RequestRows>> rows(const Request& request) const;
  /// Whether a request is drafted. With `defer`, and where drafts are drawn, the response depends on the drafts, so they are made in any
  /// batch.
  bool applies(const Request& request) const;
  CallCosts& costs() const { return costs_; }

 private:
  DraftOptions options_;
  CallCosts& costs_;
  MakeDrafter drafter_;
};

}  // namespace llm2slm::detail

#endif
