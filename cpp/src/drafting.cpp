#include "drafting.hpp"

namespace llm2slm::detail {
namespace {

constexpr std::size_t kMostDraftedRows = 2;  // with more, a call of several tokens costs as much as several calls (docs/performance.md)
constexpr double kUnlikely = 0.4;     // as in transformers' assisted generation

}  // namespace

std::vector<std::unique_ptr<RequestRows>> Drafting::rows(const Request& request) const {
  std::optional<std::size_t> fixed;
  if (options_.num_draft_tokens) fixed = static_cast<std::size_t>(*options_.num_draft_tokens);
  // A number of tokens that is asked for is drafted, however unlikely they are.
  const double least_confidence = fixed ? 0 : kUnlikely;
  // Where drafts decide the tokens, every token is drafted: tokens do not depend on the time of calls.
  const std::size_t least = options_.defer || (options_.verifier && request.options.do_sample) ? 1 : 0;
  std::vector<std::unique_ptr<RequestRows>> all;
  for (std::size_t row = 0; row < request.prompts.size(); ++row) {
    const auto drafter = [this, &request, row, least_confidence] { return drafter_(request, row, least_confidence); };
    all.push_back(std::make_unique<DraftedRow>(request, row, drafter, DraftLength(costs_, fixed, least), options_.defer));
  }
  return all;
}

bool Drafting::applies(const Request& request) const {
  return request.prompts.size() <= kMostDraftedRows || options_.defer || (options_.verifier && request.options.do_sample);
}

}  // namespace llm2slm::detail
