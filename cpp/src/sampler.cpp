#include "sampler.hpp"

#include <algorithm>
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
  for (const auto& [prompt, sequence] : rows) randoms_.emplace_back(std::vector<std::uint64_t>{entropy, prompt, sequence});
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
    scores_.assign(logits[row], logits[row] + num_tokens_);
    processors_.process(row, {scores_.data(), num_tokens_});
    ids[row] = options_.do_sample ? draw(scores_, randoms_[row])
                                  : static_cast<std::int64_t>(argmax(scores_.data(), num_tokens_));
    if (options_.output_scores) {
      log_softmax({scores_.data(), num_tokens_});
      logprobs_.push_back(scores_[static_cast<std::size_t>(ids[row])]);
    }
  }
  processors_.append(ids);
  return ids;
}

std::int64_t Sampler::draw(const std::vector<float>& scores, Random& random) {
  work_ = scores;
  softmax({work_.data(), work_.size()});
  double total = 0;
  for (const float probability : work_) total += static_cast<double>(probability);
  // One uniform number per row and call, so that a row's draws depend on nothing else.
  const double place = random.uniform();
  double cumulative = 0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < work_.size(); ++i) {
    if (!(work_[i] > 0)) continue;
    cumulative += static_cast<double>(work_[i]);
    last = i;
    if (cumulative / total > place) break;
  }
  return static_cast<std::int64_t>(last);
}

void Sampler::keep(const std::vector<std::size_t>& rows) {
  processors_.keep(rows);
  if (randoms_.empty()) return;
  std::vector<Random> selected;
  selected.reserve(rows.size());
  for (const std::size_t row : rows) selected.push_back(randoms_[row]);
  randoms_ = std::move(selected);
}

}  // namespace llm2slm::detail
