// What responses took with drafts and without, and by that whether the next one is drafted.
#ifndef LLM2SLM_RESPONSE_TIMES_HPP
#define LLM2SLM_RESPONSE_TIMES_HPP

#include <cstddef>

namespace llm2slm::detail {

/// The milliseconds per token of drafted responses, and of the others. Only whole responses show what drafts cost: a drafter's start, and
/// the decoder's slower calls after the drafter's.
class ResponseTimes {
 public:
  /// Record a response. ms: of its calls and drafts without the prompt pass.
  void add(bool drafted, std::size_t tokens, double ms);
  /// Whether to draft the next response: if that is faster, and now and then if it is not, ever more rarely.
  bool choose();

 private:
  // Responses after which one of the slower kind is tried again.
  static constexpr std::size_t kProbeAfter = 8, kRarestProbe = 256;

  struct Kind {
    double ms = 0, tokens = 0;  // decayed sums
    std::size_t responses = 0;
  };
  Kind plain_, drafted_;
  bool is_faster_ = true;  // whether drafted responses are
  std::size_t since_ = 0, probe_after_ = kProbeAfter;
};

}  // namespace llm2slm::detail

#endif
