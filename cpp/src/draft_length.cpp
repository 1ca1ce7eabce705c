#include "draft_length.hpp"

#include <algorithm>
#include <cmath>

namespace llm2slm::detail {
namespace {

constexpr std::size_t kFirstDraft = 3;   // before anything is known
constexpr std::size_t kMostAdapted = 16;
constexpr double kMemory = 0.9;          // weight of the past in the row's averages
constexpr double kPrior = 4;             // drafts that the averages of all rows count as in a new row
constexpr double kGain = 1.05;           // a draft must promise this much to be worth its risk

}  // namespace

DraftLength::DraftLength(CallCosts& costs, std::optional<std::size_t> fixed, std::size_t least)
    : costs_(costs), fixed_(fixed), least_(least), is_timed_(!fixed && least == 0),
      may_draft_(!is_timed_ || costs.drafts_next()), own_(costs.sums()) {
  // A new row expects what earlier rows had, until it has its own tokens.
  const double weight = own_.drafted > 0 ? std::min(1.0, kPrior / own_.drafted) : 0;
  own_ = {weight * own_.drafted, weight * own_.accepted};
}

void DraftLength::add(std::size_t drafted, std::size_t accepted) {
  if (drafted == 0) return;
  const std::size_t tried = std::min(drafted, accepted + 1);
  own_ = {kMemory * own_.drafted + static_cast<double>(tried), kMemory * own_.accepted + static_cast<double>(accepted)};
  costs_.add_drafts(tried, accepted);
}

std::size_t DraftLength::choose() {
  if (fixed_) return *fixed_;
  const std::optional<double> plain = costs_.call_ms(1);
  if (!plain && least_ == 0) return 0;  // the first call shows what a plain one costs
  if (!may_draft_) return 0;
  const std::size_t count = std::max(least_, costs_.is_due() ? best(plain) : 0);
  if (count == 0) {
    const bool probed = costs_.probe();
    has_drafted_ = has_drafted_ || probed;
    return probed ? 1 : 0;
  }
  costs_.pay();
  has_drafted_ = true;
  return count;
}

void DraftLength::finish(std::size_t tokens, double ms) {
  if (is_timed_) costs_.add_response(has_drafted_, tokens, ms);
}

// The number of tokens with the most tokens per millisecond.
std::size_t DraftLength::best(std::optional<double> plain) const {
  const std::optional<double> draft_token = costs_.draft_token_ms();
  if (own_.drafted < kPrior / 2 || !plain || !draft_token) return kFirstDraft;
  const double share = std::min(own_.accepted / own_.drafted, 0.99);
  std::size_t found = 0;
  double rate = kGain / *plain;
  for (std::size_t count = 1; count <= kMostAdapted; ++count) {
    const std::optional<double> call = costs_.call_ms(count + 1);
    if (!call) return kFirstDraft;
    // The accepted tokens, and the one that the call itself makes.
    const double tokens = (1 - std::pow(share, static_cast<double>(count + 1))) / (1 - share);
    const double promised = tokens / (*call + static_cast<double>(count) * *draft_token);
    if (promised > rate) {
      found = count;
      rate = promised;
    }
  }
  return found;
}

}  // namespace llm2slm::detail
