// The one loop that calls the decoder: rows that decode together, in groups that choose their own tokens. Rows that join a running
// state are left out: only Python's server needs them.
#ifndef LLM2SLM_DECODE_CORE_HPP
#define LLM2SLM_DECODE_CORE_HPP

#include <memory>
#include <optional>
#include <vector>

#include "call_costs.hpp"
#include "ort_backend.hpp"

namespace llm2slm::detail {

/// A group's part of the next decoder call.
struct Continuation {
  /// [rows, tokens] the ids to feed. With 0 tokens no call is needed before the next `advance`.
  Ids ids;
  /// [rows] for each row of the call, the row of the last logits that it continues. Rows may repeat; the others are released.
  /// Nothing: all rows go on, in their order.
  std::optional<std::vector<std::size_t>> rows;
  /// Number of positions at the end of the last call that the rows forget before this call.
  std::size_t rejected = 0;
};

/// Rows that advance together. Options, processors, draws and texts belong to the group, so they do not depend on the other groups.
class RowGroup {
 public:
  virtual ~RowGroup() = default;
  /// The number of prompts: of the group's rows in the first logits.
  virtual std::size_t num_prompts() const = 0;
  /// The number of tokens that each row may still be fed: beyond them there may be no position.
  virtual std::size_t room() const = 0;
  /// Choose the next tokens, and what to call the decoder on next; nothing if the group is finished.
  ///
  /// logits: [rows, tokens, vocab] of the first ids of the last continuation, all of them unless another group has less room; at first
  /// [prompts, 1, vocab].
  virtual std::optional<Continuation> advance(const Positions& logits) = 0;
  /// Record the milliseconds of the decoder call whose logits come next.
  virtual void add_call(double ms) { static_cast<void>(ms); }
};

/// Runs the decoder for groups of rows. Every group gets the tokens that it gets alone: rows are independent.
class DecodeCore {
 public:
  /// groups: of the state's prompts, in order. costs: records what calls cost; null: nothing does. Both outlive it.
  DecodeCore(std::unique_ptr<DecoderState> state, const std::vector<RowGroup*>& groups, CallCosts* costs);

  /// Run the prompt pass, and let every group choose its first tokens.
  void start();
  /// Run one decoder call for all rows, and let every group choose its next tokens.
  void step();
  /// Whether every group is finished.
  bool finished() const { return members_.empty(); }

 private:
  // A group, its number of rows in the state, and its part of the next call.
  struct Member {
    RowGroup* group;
    std::size_t rows;
    Continuation next;
    std::size_t tokens() const { return next.ids.size() / rows; }
  };

  Ids stacked(std::size_t tokens) const;
  void move(std::vector<std::optional<Continuation>> following, const std::vector<std::size_t>& padding);

  std::unique_ptr<DecoderState> state_;
  std::vector<Member> members_;
  CallCosts* costs_;
};

}  // namespace llm2slm::detail

#endif
