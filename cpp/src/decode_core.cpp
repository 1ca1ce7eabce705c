#include "decode_core.hpp"

#include <algorithm>

#include "stopwatch.hpp"

namespace llm2slm::detail {

DecodeCore::DecodeCore(std::unique_ptr<DecoderState> state, const std::vector<RowGroup*>& groups, CallCosts* costs)
    : state_(std::move(state)), costs_(costs) {
  for (RowGroup* group : groups) members_.push_back({group, group->num_prompts(), {}});
}

void DecodeCore::start() {
  const Positions logits = state_->prefill();
  std::vector<std::optional<Continuation>> following;
  std::size_t start = 0;
  for (const Member& member : members_) {
    following.push_back(member.group->advance(logits.part(start, member.rows, 1)));
    start += member.rows;
  }
  move(std::move(following), std::vector<std::size_t>(members_.size()));
}

void DecodeCore::step() {
  std::size_t room = members_[0].group->room(), tokens = 0, rows = 0;
  for (const Member& member : members_) room = std::min(room, member.group->room());
  for (const Member& member : members_) {
    tokens = std::max(tokens, std::min(room, member.tokens()));
    rows += member.rows;
  }
  Positions logits(nullptr, rows, 0, 0, 0);
  const Stopwatch watch;
  if (tokens > 0) {
    const bool whole = members_.size() == 1 && members_[0].tokens() == tokens;
    logits = state_->step(whole ? members_[0].next.ids : stacked(tokens));
    if (costs_ != nullptr) costs_->add_call(tokens, watch.ms());
  }
  const double call_ms = watch.ms();
  std::vector<std::optional<Continuation>> following;
  std::vector<std::size_t> padding;
  std::size_t start = 0;
  for (const Member& member : members_) {
    const std::size_t fed = std::min(tokens, member.tokens());
    member.group->add_call(call_ms);
    following.push_back(member.group->advance(logits.part(start, member.rows, fed)));
    padding.push_back(tokens - fed);
    start += member.rows;
  }
  move(std::move(following), padding);
}

// The first ids of every group as one call, [rows, tokens]. Rows with fewer are padded on the right; the padding is forgotten after
// the call.
Ids DecodeCore::stacked(std::size_t tokens) const {
  Ids fed;
  std::size_t end = 0;
  for (const Member& member : members_) {
    const std::size_t own = std::min(tokens, member.tokens());
    for (std::size_t row = 0; row < member.rows; ++row) {
      const auto first = member.next.ids.begin() + static_cast<std::ptrdiff_t>(row * member.tokens());
      fed.insert(fed.end(), first, first + static_cast<std::ptrdiff_t>(own));
      fed.resize(end += tokens);
    }
  }
  return fed;
}

// Forget the positions that groups reject, select the rows that go on, and keep their groups.
void DecodeCore::move(std::vector<std::optional<Continuation>> following, const std::vector<std::size_t>& padding) {
  std::vector<Member> running;
  std::vector<std::size_t> selected, lengths = state_->lengths();
  std::size_t start = 0;
  bool forgets = false, changes = false;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const Member& member = members_[i];
    if (std::optional<Continuation>& next = following[i]) {
      const std::size_t forgotten = next->rejected + padding[i], rows = next->rows ? next->rows->size() : member.rows;
      for (std::size_t row = 0; row < member.rows; ++row) lengths[start + row] -= forgotten;
      for (std::size_t row = 0; row < rows; ++row) selected.push_back(start + (next->rows ? (*next->rows)[row] : row));
      running.push_back({member.group, rows, std::move(*next)});
      forgets = forgets || forgotten > 0;
    }
    changes = changes || !following[i] || following[i]->rows;
    start += member.rows;
  }
  members_ = std::move(running);
  if (members_.empty()) return;
  if (forgets) state_->rewind(std::move(lengths));
  if (changes) state_->select(selected);
}

}  // namespace llm2slm::detail
