// What decoder calls and drafts cost, and how many drafts are accepted: the knowledge that the length of drafts is chosen by.
#ifndef LLM2SLM_CALL_COSTS_HPP
#define LLM2SLM_CALL_COSTS_HPP

#include <cstddef>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "response_times.hpp"

namespace llm2slm::detail {

/// Moving averages of a verifier and a drafter. Several threads may use one.
class CallCosts {
 public:
  CallCosts() = default;
  /// draft_token_ms: of drafting one token, where it is known.
  explicit CallCosts(double draft_token_ms) : draft_token_ms_(draft_token_ms) {}

  /// Record a decoder call.
  void add_call(std::size_t tokens, double ms);
  /// Record the drafting of tokens.
  void add_draft(std::size_t tokens, double ms);
  /// Record how many drafts a call accepted, of those that it tried.
  void add_drafts(std::size_t drafted, std::size_t accepted);

  /// The expected milliseconds of a call; nothing if no such call has been measured (with several tokens: no call of several).
  std::optional<double> call_ms(std::size_t tokens) const;
  /// Of drafting one token.
  std::optional<double> draft_token_ms() const;

  /// Decayed sums of all rows.
  struct Sums {
    double drafted = 0, accepted = 0;
  };
  Sums sums() const;

  /// Whether it is to be computed, for this call, if drafts pay.
  bool is_due() const;
  /// Record that drafts pay.
  void pay();
  /// Record a call for which drafts do not pay. Returns whether a token is to be drafted all the same, ever more rarely.
  bool probe();
  /// Record a response. ms: of its calls and drafts without the prompt pass.
  void add_response(bool drafted, std::size_t tokens, double ms);
  /// Whether to draft the next response.
  bool drafts_next();

 private:
  // Calls after which one token is drafted again, where drafts do not pay.
  static constexpr std::size_t kProbeAfter = 32, kRarestProbe = 2048;
  // Calls after which it is computed again whether drafts pay, where they do not.
  static constexpr std::size_t kCheckEvery = 8;

  mutable std::mutex mutex_;
  std::optional<double> plain_ms_, draft_token_ms_;
  // By the number of tokens of the call, in the order of the first calls: it decides which of two equally near ones is taken.
  std::vector<std::pair<std::size_t, double>> drafted_ms_;
  Sums sums_;
  std::size_t without_ = 0, probe_after_ = kProbeAfter;
  ResponseTimes times_;
};

}  // namespace llm2slm::detail

#endif
