#include "beam_search.hpp"

#include <algorithm>
#include <cmath>

namespace llm2slm::detail {
namespace {

// transformers' penalty for excluded candidates. It is added, not assigned, which keeps their order.
constexpr float kOut = -1e9F;

float out_where(float score, bool out) { return score + (out ? kOut : 0.0F); }

}  // namespace

BeamSearch::BeamSearch(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens,
                       const std::vector<std::size_t>& prompts, std::function<bool(const Ids&)> stops)
    : options_(options), special_ids_(special_ids), num_tokens_(num_tokens),
      beams_(static_cast<std::size_t>(options.num_beams)),
      // Enough that `num_beams` remain unfinished even if every beam's EOS ids are among the best.
      count_(std::min(std::max<std::size_t>(2, 1 + special_ids.eos.size()) * beams_, beams_ * num_tokens)),
      stops_(std::move(stops)), processors_(options, special_ids, num_tokens, prompts.size()), logprobs_(prompts.size()),
      finished_(prompts.size(), std::vector<Finished>(beams_)) {
  if (options.do_sample) {
    const std::uint64_t entropy = options.seed ? *options.seed : fresh_entropy();
    for (const std::size_t prompt : prompts) randoms_.emplace_back(std::vector<std::uint64_t>{entropy, prompt});
  }
  for (std::size_t place = 0; place < prompts.size(); ++place) {
    // All beams start identical. Only the first counts, or the first step would find every candidate `beams` times.
    open_.push_back({place, std::vector<float>(beams_, kOut)});
    open_.back().totals[0] = 0;
  }
}

std::optional<Advance> BeamSearch::advance(const Logits& logits, std::size_t vocab) {
  const std::size_t length = processors_.num_generated() + 1;
  const std::size_t rows_per_prompt = logits.size() / open_.size();
  std::vector<float> whole(vocab);
  scores_.resize(logits.size() * num_tokens_);
  for (std::size_t row = 0; row < logits.size(); ++row) {
    // transformers suppresses ids without a token after the softmax, so the softmax includes them.
    whole.assign(logits[row], logits[row] + vocab);
    log_softmax({whole.data(), vocab});
    float* scores = scores_.data() + row * num_tokens_;
    std::copy_n(whole.begin(), num_tokens_, scores);
    processors_.process(row, {scores, num_tokens_});
  }
  const bool last = static_cast<std::int64_t>(length) == options_.max_new_tokens;
  Advance next;
  std::vector<Open> going;
  std::vector<std::vector<float>> logprobs;
  for (std::size_t i = 0; i < open_.size(); ++i) {
    const std::vector<Candidate> found = candidates(open_[i], i * rows_per_prompt, rows_per_prompt);
    std::vector<bool> finished(found.size());
    std::vector<float> running(found.size());
    for (std::size_t at = 0; at < found.size(); ++at) {
      finished[at] = found[at].stopped || last;
      running[at] = out_where(found[at].total, finished[at]);
    }
    const std::vector<std::size_t> places = highest(running.data(), running.size(), beams_);
    finish(open_[i].place, found, finished, length);
    const bool all_finished = std::all_of(finished.begin(), finished.end(), [](bool f) { return f; });
    if (all_finished || !goes_on(open_[i].place, running[places[0]], length)) continue;
    going.push_back({open_[i].place, {}});
    for (const std::size_t at : places) {
      next.rows.push_back(found[at].row);
      next.ids.push_back(found[at].id);
      going.back().totals.push_back(running[at]);
      if (!options_.output_scores) continue;
      logprobs.push_back(logprobs_[found[at].row]);
      logprobs.back().push_back(found[at].logprob);
    }
  }
  processors_.keep(next.rows);
  processors_.append(next.ids);
  open_ = std::move(going);
  logprobs_ = std::move(logprobs);
  if (next.rows.empty()) return std::nullopt;
  return next;
}

std::vector<BeamSearch::Candidate> BeamSearch::candidates(const Open& open, std::size_t first_row,
                                                          std::size_t rows_per_prompt) {
  std::vector<float> totals(beams_ * num_tokens_);
  for (std::size_t beam = 0; beam < beams_; ++beam) {
    // In the first call all beams of a prompt share its row.
    const float* scores = scores_.data() + (first_row + (rows_per_prompt == 1 ? 0 : beam)) * num_tokens_;
    for (std::size_t id = 0; id < num_tokens_; ++id) totals[beam * num_tokens_ + id] = scores[id] + open.totals[beam];
  }
  const std::vector<std::size_t> columns =
      options_.do_sample ? drawn(totals, randoms_[open.place]) : highest(totals.data(), totals.size(), count_);
  std::vector<Candidate> found;
  for (const std::size_t column : columns) {
    Candidate candidate;
    const std::size_t beam = column / num_tokens_, id = column % num_tokens_;
    candidate.row = first_row + (rows_per_prompt == 1 ? 0 : beam);
    candidate.id = static_cast<std::int64_t>(id);
    candidate.total = totals[column];
    candidate.logprob = scores_[candidate.row * num_tokens_ + id];
    candidate.stopped = std::count(special_ids_.eos.begin(), special_ids_.eos.end(), candidate.id) > 0;
    if (!candidate.stopped && stops_) {
      Ids ids = processors_.generated(candidate.row);
      ids.push_back(candidate.id);
      candidate.stopped = stops_(ids);
    }
    found.push_back(candidate);
  }
  return found;
}

std::vector<std::size_t> BeamSearch::drawn(const std::vector<float>& totals, Random& random) const {
  std::vector<float> probabilities = totals;
  softmax({probabilities.data(), probabilities.size()});
  // Exponential waiting times at these rates end in the order of draws without replacement.
  std::vector<std::pair<double, std::size_t>> waits;
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] == 0) continue;
    waits.emplace_back(random.exponential() / static_cast<double>(probabilities[i]), i);
  }
  std::sort(waits.begin(), waits.end());
  std::vector<std::size_t> columns;
  for (std::size_t i = 0; i < std::min(count_, waits.size()); ++i) columns.push_back(waits[i].second);
  // Too few possible candidates: the rest have probability 0 and the excluded score anyway.
  for (std::size_t i = 0; i < probabilities.size() && columns.size() < count_; ++i) {
    if (probabilities[i] == 0) columns.push_back(i);
  }
  // The search continues with the best of the drawn candidates.
  std::stable_sort(columns.begin(), columns.end(), [&](std::size_t a, std::size_t b) { return totals[a] > totals[b]; });
  return columns;
}

void BeamSearch::finish(std::size_t place, const std::vector<Candidate>& found, const std::vector<bool>& finished,
                        std::size_t length) {
  std::vector<Finished>& before = finished_[place];
  std::vector<float> scores;
  std::vector<bool> finishing;
  for (std::size_t at = 0; at < found.size(); ++at) {
    // A candidate beyond the first `beams` may continue, but not finish.
    finishing.push_back(finished[at] && at < beams_);
    scores.push_back(out_where(found[at].total / weight(length), !finishing[at]));
  }
  // New hypotheses come first: ties go to the first. Unfinished ones have the worst score.
  for (const Finished& old : before) scores.push_back(old.score);
  std::vector<Finished> best;
  for (const std::size_t at : highest(scores.data(), scores.size(), beams_)) {
    if (at >= found.size()) {
      best.push_back(before[at - found.size()]);
    } else if (finishing[at]) {
      best.push_back({scores[at], true, hypothesis(found[at], scores[at])});
    } else {
      best.push_back({scores[at], false, std::nullopt});
    }
  }
  before = std::move(best);
}

// Whether a prompt's beams, with the best total `best`, may still beat the finished hypotheses: transformers' heuristic.
// `early_stopping="never"` assumes the most favourable length.
bool BeamSearch::goes_on(std::size_t place, float best, std::size_t length) const {
  const std::vector<Finished>& finished = finished_[place];
  const bool patient = options_.early_stopping == EarlyStopping::never && options_.length_penalty > 0;
  const float possible = best / weight(patient ? static_cast<std::size_t>(options_.max_new_tokens) : length);
  float worst = finished[0].score;
  bool all_complete = true, improvable = false;
  for (const Finished& each : finished) {
    worst = std::min(worst, each.score);
    all_complete = all_complete && each.complete;
  }
  for (const Finished& each : finished) improvable = improvable || possible > (each.complete ? worst : kOut);
  return improvable && !(options_.early_stopping == EarlyStopping::yes && all_complete);
}

Hypothesis BeamSearch::hypothesis(const Candidate& candidate, float score) const {
  Hypothesis made;
  made.token_ids = processors_.generated(candidate.row);
  made.token_ids.push_back(candidate.id);
  made.finish_reason = candidate.stopped ? FinishReason::stop : FinishReason::length;
  made.score = score;
  if (options_.output_scores) {
    made.logprobs = logprobs_[candidate.row];
    made.logprobs.push_back(candidate.logprob);
  }
  return made;
}

float BeamSearch::weight(std::size_t length) const {
  return static_cast<float>(std::pow(static_cast<double>(length), options_.length_penalty));
}

std::vector<std::vector<Hypothesis>> BeamSearch::results() const {
  std::vector<std::vector<Hypothesis>> all;
  for (const std::vector<Finished>& best : finished_) {
    all.emplace_back();
    for (std::size_t i = 0; i < static_cast<std::size_t>(options_.num_return_sequences); ++i) {
      all.back().push_back(best[i].hypothesis.value_or(Hypothesis{}));
    }
  }
  return all;
}

}  // namespace llm2slm::detail
