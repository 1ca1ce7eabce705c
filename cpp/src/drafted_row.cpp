#include "drafted_row.hpp"

#include <algorithm>

#include "stopwatch.hpp"

namespace llm2slm::detail {
namespace {

constexpr double kUnreached = 2;  // a confidence that no draft has

}  // namespace

Draws draws_of(const Request& request, std::size_t row, Draw purpose) {
  return Draws({request.options.seed.value_or(0), request.prompts[row], 0, static_cast<std::uint64_t>(purpose)});
}

DraftedRow::DraftedRow(const Request& request, std::size_t row, std::function<std::unique_ptr<Drafter>()> drafter,
                       DraftLength length, std::optional<double> defer)
    : RequestRows(request, 1), row_(row), make_drafter_(std::move(drafter)), length_(length), defers_(defer.has_value()),
      confident_(defer && *defer < 1 ? *defer : kUnreached),
      sampler_(request.options, request.manifest.special_ids, request.num_tokens, {{request.prompts[row], 0}}),
      accepts_(draws_of(request, row, Draw::accept)), redraws_(draws_of(request, row, Draw::redraw)), text_(request) {}

std::optional<Continuation> DraftedRow::advance(const Positions& logits) {
  const Stopwatch watch;
  std::optional<Continuation> following = advanced(logits);
  ms_ += watch.ms();
  if (!following) length_.finish(ids_.size(), ms_);
  return following;
}

std::optional<Continuation> DraftedRow::advanced(const Positions& logits) {
  last_.clear();
  const std::size_t fed = logits.tokens();
  if (!ids_.empty() && fed < unfed_) {
    unfed_ -= fed;
    if (fed > 0) return feed(0);
    return draft(0);
  }
  const std::size_t first = unfed_ > 0 ? unfed_ - 1 : 0, verifiable = fed - first - 1;
  std::size_t accepted = 0;
  for (std::size_t at = 0; at <= verifiable; ++at) {
    const std::optional<DraftToken> proposed =
        at < block_.size() ? std::optional<DraftToken>(std::move(block_[at])) : next_draft();
    const std::int64_t id = decide(logits.at(0, first + at), proposed ? &*proposed : nullptr);
    if (at == verifiable || !proposed || proposed->id != id) break;
    ++accepted;
    if (finished()) break;
  }
  drafted_ += verifiable;
  accepted_ += accepted;
  length_.add(verifiable, accepted);
  unfed_ = 1;
  if (finished()) return std::nullopt;
  return draft(verifiable - accepted);
}

std::vector<Generation> DraftedRow::responses(const Timings& timings) const {
  Generation response = text_.response(request_.blank(row_, timings));
  response.drafted_tokens = drafted_;
  response.accepted_tokens = accepted_;
  return {std::move(response)};
}

// The number of tokens that may be fed behind the response so far.
std::size_t DraftedRow::draft_room() const {
  const std::size_t most = max_new_tokens();
  return most > ids_.size() + 1 ? most - ids_.size() - 1 : 0;
}

// At most `most` drafts of the tokens after the response so far.
std::vector<DraftToken> DraftedRow::drafts(std::size_t most) {
  if (drafter_ == nullptr) drafter_ = make_drafter_();
  return drafter_->draft(ids_, most);
}

// A draft of the next token alone, where the choice depends on it; nothing: it does not, or there is none.
std::optional<DraftToken> DraftedRow::next_draft() {
  if (!defers_ && !request_.options.do_sample) return std::nullopt;
  std::vector<DraftToken> found = drafts(1);
  if (found.empty()) return std::nullopt;
  return std::move(found[0]);
}

// Append the next token, by the verifier's logits [vocab] and a draft.
std::int64_t DraftedRow::decide(const float* logits, const DraftToken* draft) {
  const std::size_t index = ids_.size();
  request_.require_finite({logits}, {row_}, index + 1);
  const bool sure = draft != nullptr && draft->confidence >= confident_;
  const bool drawn = draft != nullptr && !draft->distribution.empty();
  std::optional<float> logprob;
  std::int64_t id = 0;
  if (sure || drawn) {
    const std::vector<float>& scores = sampler_.scores(0, logits);
    id = sure ? draft->id : verified(scores, *draft, accepts_[index], redraws_[index]);
    sampler_.accept({id});
    if (request_.options.output_scores) logprob = logprob_of(id, scores);
  } else {
    id = sampler_.choose({logits})[0];
    if (request_.options.output_scores) logprob = sampler_.logprobs()[0];
  }
  emit(id, logprob);
  return id;
}

// Append a token to the response.
void DraftedRow::emit(std::int64_t id, std::optional<float> logprob) {
  ids_.push_back(id);
  last_.push_back(text_.push(id, logprob, ids_.size() == max_new_tokens()));
}

// Draft the next block.
std::optional<Continuation> DraftedRow::draft(std::size_t rejected) {
  // A draft of the last new token is not fed, but may be accepted without the verifier.
  std::size_t most = std::min(length_.choose(), draft_room());
  if (defers_) most = std::max<std::size_t>(most, 1);
  block_ = most > 0 ? drafts(most) : std::vector<DraftToken>{};
  std::size_t confident = 0;
  while (confident < block_.size() && block_[confident].confidence >= confident_) {
    const std::int64_t id = block_[confident++].id;
    ++unfed_;
    sampler_.accept({id});
    emit(id, std::nullopt);
    if (finished()) return std::nullopt;
  }
  block_.erase(block_.begin(), block_.begin() + static_cast<std::ptrdiff_t>(confident));
  // The verifier is not needed yet.
  if (confident > 0 && block_.empty()) return Continuation{{}, std::nullopt, rejected};
  return feed(rejected);
}

// Feed the response's ids that were not fed, and the block.
Continuation DraftedRow::feed(std::size_t rejected) const {
  Continuation next{{ids_.end() - static_cast<std::ptrdiff_t>(unfed_), ids_.end()}, std::nullopt, rejected};
  std::size_t count = std::min(block_.size(), draft_room());
  const Ids& eos = request_.manifest.special_ids.eos;
  // The token after an EOS is not needed.
  if (count > 0 && std::find(eos.begin(), eos.end(), block_[count - 1].id) != eos.end()) --count;
  for (std::size_t i = 0; i < count; ++i) next.ids.push_back(block_[i].id);
  return next;
}

}  // namespace llm2slm::detail
