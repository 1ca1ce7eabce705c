#include "beam_rows.hpp"

#include <algorithm>
#include <numeric>

#include "detokenizer.hpp"

namespace llm2slm::detail {
namespace {

// Whether the text of ids has a stop string in it; empty where there are none.
std::function<bool(const Ids&)> stop_check(const Request& request) {
  if (request.options.stop.empty()) return {};
  return [&request](const Ids& ids) {
    return find_first(request.tokenizer.decode(ids), request.options.stop) != std::string::npos;
  };
}

}  // namespace

BeamRows::BeamRows(const Request& request)
    : RequestRows(request, request.prompts.size()),
      search_(request.options, request.manifest.special_ids, request.num_tokens, request.prompts, stop_check(request)),
      sources_(request.prompts.size()) {
  std::iota(sources_.begin(), sources_.end(), std::size_t{0});
}

std::optional<Continuation> BeamRows::advance(const Positions& logits) {
  const Logits rows = logits.first();
  request_.require_finite(rows, sources_, ++new_tokens_);
  std::optional<Advance> next = search_.advance(rows, logits.vocab());
  if (!next) return std::nullopt;
  std::vector<std::size_t> following;
  for (const std::size_t row : next->rows) following.push_back(sources_[row]);
  sources_ = std::move(following);
  return Continuation{std::move(next->ids), std::move(next->rows), 0};
}

std::vector<Generation> BeamRows::responses(const Timings& timings) const {
  std::vector<Generation> all;
  const std::vector<std::vector<Hypothesis>> found = search_.results();
  for (std::size_t row = 0; row < found.size(); ++row) {
    for (const Hypothesis& best : found[row]) {
      Generation response = request_.blank(row, timings);
      response.text = request_.tokenizer.decode(best.token_ids);
      response.text.resize(std::min(response.text.size(), find_first(response.text, request_.options.stop)));
      response.token_ids = best.token_ids;
      response.finish_reason = best.finish_reason;
      response.score = static_cast<double>(best.score);
      response.token_logprobs = best.logprobs;
      all.push_back(std::move(response));
    }
  }
  return all;
}

}  // namespace llm2slm::detail
