#include "sampler.hpp"

#include <random>

namespace llm2slm::detail {

std::uint64_t fresh_entropy() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

Sampler::Sampler(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens,
                 const std::vector<std::pair<std::size_t, std::size_t>>& rows)
    : options_(options), num_tokens_(num_tokens), processors_(options, special_ids, num_tokens, rows.size()) {
  if (!options.do_sample) return;
  const std::uint64_t entropy = options.seed ? *options.seed : fresh_entropy();
  for (const auto& [prompt, sequence] : rows) draws_.emplace_back(std::vector<std::uint64_t>{entropy, prompt, sequence});
}

Ids Sampler::choose(const Logits& logits) {
  Ids ids(logits.size());
  const bool as_given = processors_.idle() && !options_.output_scores;
  logprobs_.clear();
  for (std::size_t row = 0; row < logits.size(); ++row) {
    if (as_given) {
      ids[row] = static_cast<std::int64_t>(argmax(logits[row], num_tokens_));
      continue;
    }
    scores(row, logits[row]);
    if (options_.do_sample) {
      work_ = scores_;
      softmax({work_.data(), work_.size()});
      ids[row] = draw(work_, draws_[row][processors_.num_generated()]);
    } else {
      ids[row] = static_cast<std::int64_t>(argmax(scores_.data(), num_tokens_));
    }
    if (options_.output_scores) logprobs_.push_back(logprob_of(ids[row], scores_));
  }
  processors_.append(ids);
  return ids;
}

const std::vector<float>& Sampler::scores(std::size_t row, const float* logits) {
  scores_.assign(logits, logits + num_tokens_);
  processors_.process(row, {scores_.data(), num_tokens_});
  return scores_;
}

void Sampler::keep(const std::vector<std::size_t>& rows) {
  processors_.keep(rows);
  if (draws_.empty()) return;
  std::vector<Draws> selected;
  selected.reserve(rows.size());
  for (const std::size_t row : rows) selected.push_back(draws_[row]);
  draws_ = std::move(selected);
}

float logprob_of(std::int64_t id, std::vector<float> scores) {
  log_softmax({scores.data(), scores.size()});
  return scores[static_cast<std::size_t>(id)];
}

}  // namespace llm2slm::detail
