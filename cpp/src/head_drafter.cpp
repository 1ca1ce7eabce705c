#include "head_drafter.hpp"

#include <algorithm>
#include <cmath>

#include "drafted_row.hpp"
#include "stopwatch.hpp"

namespace llm2slm::detail {

HeadDrafter::HeadDrafter(const Request& request, std::size_t row, std::unique_ptr<DecoderState> state, CallCosts& costs,
                         double least_confidence)
    : request_(request), state_(std::move(state)), costs_(costs), least_confidence_(least_confidence),
      sampler_(request.options, request.manifest.special_ids, request.num_tokens, {{request.prompts[row], 0}}),
      draws_(draws_of(request, row, Draw::draft)) {
  read(state_->prefill());
  start_ = state_->lengths()[0];
  std::int64_t most = request.options.max_new_tokens;
  // In an encoder-decoder SLM the start token takes the last new token's position.
  if (request.manifest.max_total_tokens) {
    most = std::min(most, *request.manifest.max_total_tokens - static_cast<std::int64_t>(start_));
  }
  most_ = static_cast<std::size_t>(std::max<std::int64_t>(most, 0));
}

std::vector<DraftToken> HeadDrafter::draft(const Ids& ids, std::size_t most) {
  most = std::min(most, most_ > ids.size() ? most_ - ids.size() : 0);
  std::vector<DraftToken> drafts;
  if (most == 0) return drafts;
  const Stopwatch watch;
  catch_up(ids);
  const Ids& eos = request_.manifest.special_ids.eos;
  while (true) {
    drafts.push_back(choose(ids.size() + drafts.size()));
    const DraftToken& last = drafts.back();
    const bool ends = std::find(eos.begin(), eos.end(), last.id) != eos.end();
    if (drafts.size() == most || ends || last.confidence < least_confidence_) break;
    feed({last.id});
  }
  costs_.add_draft(drafts.size(), watch.ms());
  return drafts;
}

// Bring the state to `ids`, whose last token it may not have been fed.
void HeadDrafter::catch_up(const Ids& ids) {
  std::size_t same = common_prefix(fed_, ids);
  // The logits of the last id were overwritten.
  if (same == ids.size() && same < fed_.size() && same > 0) --same;
  if (same < fed_.size()) {
    state_->rewind({start_ + same});
    fed_.resize(same);
  }
  const std::size_t kept = common_prefix(chosen_, ids);
  sampler_.truncate(kept);
  chosen_.resize(kept);
  for (std::size_t i = kept; i < ids.size(); ++i) append(ids[i]);
  if (same < ids.size()) feed({ids.begin() + static_cast<std::ptrdiff_t>(same), ids.end()});
}

void HeadDrafter::feed(const Ids& ids) {
  read(state_->step(ids));
  fed_.insert(fed_.end(), ids.begin(), ids.end());
}

// Keep the logits of the last token: a state's own are valid until its next call.
void HeadDrafter::read(const Positions& logits) {
  const float* last = logits.at(0, logits.tokens() - 1);
  logits_.assign(last, last + logits.vocab());
}

// The head's choice of the token with this index in the response.
DraftToken HeadDrafter::choose(std::size_t index) {
  DraftToken draft;
  const std::vector<float>& scores = sampler_.scores(0, logits_.data());
  if (request_.options.do_sample) {
    draft.distribution = scores;
    softmax({draft.distribution.data(), draft.distribution.size()});
    draft.id = draw(draft.distribution, draws_[index]);
  } else {
    draft.id = static_cast<std::int64_t>(argmax(scores.data(), scores.size()));
  }
  append(draft.id);
  const auto most = static_cast<double>(maximum(logits_.data(), request_.num_tokens));
  double total = 0;
  for (std::size_t i = 0; i < request_.num_tokens; ++i) total += std::exp(static_cast<double>(logits_[i]) - most);
  draft.confidence = std::exp(static_cast<double>(logits_[static_cast<std::size_t>(draft.id)]) - most) / total;
  return draft;
}

void HeadDrafter::append(std::int64_t id) {
  sampler_.accept({id});
  chosen_.push_back(id);
}

}  // namespace llm2slm::detail
