#include "call_costs.hpp"

#include <algorithm>

namespace llm2slm::detail {
namespace {

// The weight of the past in the moving averages of costs, and of drafts.
constexpr double kMemory = 0.9, kLongMemory = 0.98;

double averaged(std::optional<double> before, double value) {
  return before ? kMemory * *before + (1 - kMemory) * value : value;
}

}  // namespace

void CallCosts::add_call(std::size_t tokens, double ms) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (tokens == 1) {
    plain_ms_ = averaged(plain_ms_, ms);
    return;
  }
  for (auto& [count, known_ms] : drafted_ms_) {
    if (count != tokens) continue;
    known_ms = averaged(known_ms, ms);
    return;
  }
  drafted_ms_.emplace_back(tokens, ms);
}

void CallCosts::add_draft(std::size_t tokens, double ms) {
  const std::lock_guard<std::mutex> lock(mutex_);
  draft_token_ms_ = averaged(draft_token_ms_, ms / static_cast<double>(tokens));
}

void CallCosts::add_drafts(std::size_t drafted, std::size_t accepted) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sums_.drafted = kLongMemory * sums_.drafted + static_cast<double>(drafted);
  sums_.accepted = kLongMemory * sums_.accepted + static_cast<double>(accepted);
}

std::optional<double> CallCosts::call_ms(std::size_t tokens) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (tokens == 1) return plain_ms_;
  if (drafted_ms_.empty()) return std::nullopt;
  // A line through the two nearest measured numbers of tokens, one token counting as measured.
  std::vector<std::pair<std::size_t, double>> known = drafted_ms_;
  if (plain_ms_) known.emplace_back(1, *plain_ms_);
  double least = known[0].second;
  for (const auto& [count, ms] : known) {
    if (count == tokens) return ms;
    least = std::min(least, ms);
  }
  if (known.size() == 1) return known[0].second;
  const auto distance = [tokens](std::size_t count) { return count > tokens ? count - tokens : tokens - count; };
  std::stable_sort(known.begin(), known.end(),
                   [&](const auto& a, const auto& b) { return distance(a.first) < distance(b.first); });
  if (known[1].first < known[0].first) std::swap(known[0], known[1]);
  const auto [from, from_ms] = known[0];
  const auto [to, to_ms] = known[1];
  const double slope = std::max(0.0, (to_ms - from_ms) / static_cast<double>(to - from));
  return std::max(from_ms + slope * (static_cast<double>(tokens) - static_cast<double>(from)), least);
}

std::optional<double> CallCosts::draft_token_ms() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return draft_token_ms_;
}

CallCosts::Sums CallCosts::sums() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return sums_;
}

bool CallCosts::is_due() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return without_ % kCheckEvery == 0;
}

void CallCosts::pay() {
  const std::lock_guard<std::mutex> lock(mutex_);
  without_ = 0;
  probe_after_ = kProbeAfter;
}

bool CallCosts::probe() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (++without_ < probe_after_) return false;
  without_ = 0;
  probe_after_ = std::min(2 * probe_after_, kRarestProbe);
  return true;
}

void CallCosts::add_response(bool drafted, std::size_t tokens, double ms) {
  const std::lock_guard<std::mutex> lock(mutex_);
  times_.add(drafted, tokens, ms);
}

bool CallCosts::drafts_next() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return times_.choose();
}

}  // namespace llm2slm::detail
