#include "response_times.hpp"

#include <algorithm>

namespace llm2slm::detail {
namespace {

constexpr std::size_t kTried = 3;  // responses of each kind before one is preferred
constexpr double kMemory = 0.7;    // weight of the past in a kind's sums

}  // namespace

void ResponseTimes::add(bool drafted, std::size_t tokens, double ms) {
  Kind& kind = drafted ? drafted_ : plain_;
  kind.ms = kMemory * kind.ms + ms;
  kind.tokens = kMemory * kind.tokens + static_cast<double>(tokens);
  ++kind.responses;
}

bool ResponseTimes::choose() {
  if (std::min(drafted_.responses, plain_.responses) < kTried) return drafted_.responses <= plain_.responses;
  const bool is_faster = drafted_.ms * plain_.tokens < plain_.ms * drafted_.tokens;
  if (is_faster != is_faster_) {
    is_faster_ = is_faster;
    since_ = 0;
    probe_after_ = kProbeAfter;
  }
  if (++since_ <= probe_after_) return is_faster;
  since_ = 0;
  probe_after_ = std::min(2 * probe_after_, kRarestProbe);
  return !is_faster;
}

}  // namespace llm2slm::detail
