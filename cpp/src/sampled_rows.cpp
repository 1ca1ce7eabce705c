#include "sampled_rows.hpp"

namespace llm2slm::detail {
namespace {

std::vector<std::pair<std::size_t, std::size_t>> names_of(const Request& request) {
  std::vector<std::pair<std::size_t, std::size_t>> names;
  for (const std::size_t prompt : request.prompts) {
    for (std::int64_t sequence = 0; sequence < request.options.num_return_sequences; ++sequence) {
      names.emplace_back(prompt, static_cast<std::size_t>(sequence));
    }
  }
  return names;
}

}  // namespace

SampledRows::SampledRows(const Request& request)
    : RequestRows(request, request.prompts.size()), count_(static_cast<std::size_t>(request.options.num_return_sequences)),
      sampler_(request.options, request.manifest.special_ids, request.num_tokens, names_of(request)),
      texts_(request.prompts.size() * count_, ResponseText(request)) {
  for (std::size_t row = 0; row < texts_.size(); ++row) {
    running_.push_back(row);
    sources_.push_back(row / count_);
  }
}

std::optional<Continuation> SampledRows::advance(const Positions& logits) {
  // In the first call the sequences of a prompt share its row.
  const bool shared = new_tokens_ == 0 && count_ > 1;
  Logits rows = logits.first();
  if (shared) {
    rows.clear();
    for (const std::size_t source : sources_) rows.push_back(logits.at(source, 0));
  }
  request_.require_finite(rows, sources_, ++new_tokens_);
  Continuation next{sampler_.choose(rows), std::nullopt, 0};
  std::vector<std::size_t> going;
  last_.clear();
  for (std::size_t i = 0; i < running_.size(); ++i) {
    const std::optional<float> logprob =
        request_.options.output_scores ? std::optional<float>(sampler_.logprobs()[i]) : std::nullopt;
    last_.push_back(texts_[running_[i]].push(next.ids[i], logprob, new_tokens_ == max_new_tokens()));
    if (!last_[i].finish_reason) going.push_back(i);
  }
  if (going.empty()) return std::nullopt;
  if (shared) next.rows = sources_;
  if (going.size() == running_.size()) return next;
  std::vector<std::size_t> kept;
  for (std::size_t i = 0; i < going.size(); ++i) {
    kept.push_back(shared ? sources_[going[i]] : going[i]);
    running_[i] = running_[going[i]];
    next.ids[i] = next.ids[going[i]];
  }
  for (std::size_t i = 0; i < going.size(); ++i) sources_[i] = running_[i] / count_;
  for (auto* rows_left : {&running_, &sources_}) rows_left->resize(going.size());
  next.ids.resize(going.size());
  sampler_.keep(going);
  next.rows = std::move(kept);
  return next;
}

std::vector<Generation> SampledRows::responses(const Timings& timings) const {
  std::vector<Generation> all;
  for (std::size_t row = 0; row < texts_.size(); ++row) all.push_back(texts_[row].response(request_.blank(row / count_, timings)));
  return all;
}

}  // namespace llm2slm::detail
