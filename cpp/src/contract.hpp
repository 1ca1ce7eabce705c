// The tensor contract: names of what crosses the three graphs, and the sizes of a pair. The Python package's contract.py is
// the source. Axis names:
//
//     batch             rows
//     prompt            LLM prompt tokens (padded on the right)
//     sequence_length   token ids given to one decoder call
//     embeds_length     prompt embeddings given to one decoder-only decoder call (the prompt pass; 0 afterwards)
//     context           positions that the decoder is conditioned on: `prompt`, or twice that with the fusion `prefix`
//     capacity          positions that the cache has room for
//     num_logits        positions of each row whose logits a decoder-only decoder returns
#ifndef LLM2SLM_CONTRACT_HPP
#define LLM2SLM_CONTRACT_HPP

#include <cstdint>
#include <string>
#include <vector>

namespace llm2slm::detail {

inline constexpr const char* kInputIds = "input_ids";
inline constexpr const char* kAttentionMask = "attention_mask";
inline constexpr const char* kEncoderAttentionMask = "encoder_attention_mask";
inline constexpr const char* kHiddenStates = "hidden_states";
inline constexpr const char* kPromptEmbeds = "prompt_embeds";
inline constexpr const char* kLogitsToKeep = "logits_to_keep";
inline constexpr const char* kPastLength = "past_length";
inline constexpr const char* kLogits = "logits";

/// A dynamic axis has a name, a fixed one a size.
struct Axis {
  std::string name;
  std::int64_t size = 0;

  friend bool operator==(const Axis& a, const Axis& b) { return a.name == b.name && a.size == b.size; }
};

struct TensorSpec {
  std::string name, dtype;
  std::vector<Axis> axes;

  friend bool operator==(const TensorSpec& a, const TensorSpec& b) {
    return a.name == b.name && a.dtype == b.dtype && a.axes == b.axes;
  }
};

/// A tensor as messages name it: name, type and axes.
std::string text_of(const TensorSpec& tensor);

/// One piece of decoder state: read as `past`, written as `present`, which may be the same memory. The first axis is `batch`,
/// and one axis, of any place, is `capacity`.
struct StateSpec {
  TensorSpec past, present;

  /// The index of the axis `capacity`. Throws Error(bundle): there is none.
  std::size_t growing_axis() const;

  friend bool operator==(const StateSpec& a, const StateSpec& b) { return a.past == b.past && a.present == b.present; }
};

/// What crosses a graph, in its order.
struct GraphSpec {
  std::vector<TensorSpec> inputs, outputs;
};

/// The sizes of a pair that the contract depends on. `num_key_value_heads` counts the SLM decoder's key/value heads.
struct PairShape {
  std::string slm_kind, fusion;
  std::int64_t encoder_hidden_size = 0, hidden_size = 0, num_hidden_layers = 0;
  std::int64_t num_key_value_heads = 0, head_dim = 0, vocab_size = 0;

  bool decoder_only() const { return slm_kind == "decoder-only"; }
  /// Whether the fusion needs the prompt's own embeddings, and so its ids.
  bool projector_reads_ids() const { return fusion == "add" || fusion == "prefix"; }
  /// Positions the decoder is conditioned on for each prompt token.
  std::size_t context_per_token() const { return fusion == "prefix" ? 2 : 1; }
};

/// The decoder's state (the KV cache) of a pair. dtype: of keys and values, `float32` or `float16`.
std::vector<StateSpec> state_spec(const PairShape& shape, const std::string& dtype);

/// A graph of a pair. name: `encoder`, `projector` or `decoder`.
GraphSpec graph_spec(const std::string& name, const PairShape& shape, const std::string& dtype);

}  // namespace llm2slm::detail

#endif
