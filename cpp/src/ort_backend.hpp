// A pair's three graphs in ONNX Runtime. The cache stays where it is: its present is bound to its past. A step binds nothing and
// allocates nothing but what ONNX Runtime does inside: ids and the lengths of the past are written into tensors that stay bound,
// and logits are read from one. What they are bound to changes with the number of rows, and when the cache needs more room.
#ifndef LLM2SLM_ORT_BACKEND_HPP
#define LLM2SLM_ORT_BACKEND_HPP

#include <memory>
#include <optional>
#include <vector>

#include "logits.hpp"
#include "logits_processors.hpp"
#include "manifest.hpp"
#include "session.hpp"

namespace llm2slm::detail {

/// What the decoder is conditioned on: the projector's outputs for a batch of prompts, and the prompts' lengths.
struct Conditioning {
  Tensors tensors;
  std::vector<std::size_t> prompt_tokens;

  /// That of one prompt alone. Its tensors stay as wide as the longest prompt's.
  Conditioning of(std::size_t prompt, const std::shared_ptr<const Ort>& ort) const;
};

/// A decoder's state: the tensors bound to its next calls. It belongs to one generation in one thread.
class DecoderState {
 public:
  DecoderState(std::shared_ptr<const Session> session, const Manifest& manifest, const Conditioning& conditioning);

  /// The first decoder call: the start token (encoder-decoder) or the prompt embeddings (decoder-only). Logits of one token.
  Positions prefill();
  /// One decoder call on ids [rows, tokens]: logits of the token after each.
  Positions step(const Ids& ids);
  /// [rows] the positions of the cache that each row occupies.
  const std::vector<std::size_t>& lengths() const { return lengths_; }
  /// Forget the positions of each row beyond `lengths` [rows], none of them longer than the row's.
  void rewind(std::vector<std::size_t> lengths) { lengths_ = std::move(lengths); }
  /// Keep only these rows, in this order. Rows may repeat.
  void select(const std::vector<std::size_t>& rows);

 private:
  Positions decode(const Ids& ids, std::size_t embeds_length);
  void make_room(std::size_t count);
  void hold(const StateSpec& spec, std::shared_ptr<Tensor> tensor);
  void bind_step_inputs(std::size_t tokens);
  std::vector<std::int64_t> shape_of(std::size_t tokens) const;
  std::vector<std::int64_t> cache_shape(const StateSpec& spec) const;
  void reorder(const StateSpec& spec, const std::vector<std::size_t>& rows);
  void copy_written(const StateSpec& spec, const Tensor& from, const std::vector<std::size_t>& rows, Tensor& to) const;

  const Manifest& manifest_;
  std::shared_ptr<const Ort> ort_;
  Binding binding_;
  std::vector<std::string> conditioning_names_;
  // [prompts] the positions that condition each, and how many the tensors have.
  std::vector<std::size_t> contexts_;
  std::size_t context_ = 0;
  // [rows] the row of the conditioning that each row reads, and the positions of the cache that each occupies.
  std::vector<std::size_t> sources_, lengths_;
  std::size_t capacity_ = 0;
  std::shared_ptr<Tensor> logits_;
  // By state name: a second buffer. Rows are copied into it, then it is exchanged with the bound one.
  Tensors spare_;
};

class OrtBackend {
 public:
  /// Throws Error(runtime): the bundle needs a newer ONNX Runtime; Error(bundle): a graph cannot be loaded, or has
  /// other inputs or outputs than the manifest says.
  ///
  /// encoder: one that is open already; none opens the bundle's.
  OrtBackend(std::shared_ptr<const Ort> ort, const std::filesystem::path& directory, const Manifest& manifest,
             const Options& options, std::shared_ptr<const Session> encoder);

  /// Hidden states [batch, prompt, encoder_hidden_size] for ids and mask [batch, prompt].
  std::shared_ptr<Tensor> encode(const std::shared_ptr<Tensor>& input_ids, const std::shared_ptr<Tensor>& mask) const;
  /// The projector's outputs. Throws Error(bundle): they have another shape than the contract says.
  Tensors project(const std::shared_ptr<Tensor>& hidden, const std::shared_ptr<Tensor>& input_ids,
                  const std::shared_ptr<Tensor>& mask) const;
  /// manifest: outlives the state.
  std::unique_ptr<DecoderState> decoder(const Manifest& manifest, const Conditioning& conditioning) const;

  const std::shared_ptr<const Ort>& ort() const { return ort_; }
  const std::shared_ptr<const Session>& encoder() const { return encoder_; }

 private:
  const Session& opened(const std::shared_ptr<const Session>& session, const char* name) const;

  std::shared_ptr<const Ort> ort_;
  bool projector_reads_ids_;
  std::vector<std::string> projector_outputs_;
  std::vector<TensorSpec> projector_specs_;
  std::size_t context_per_token_ = 1;
  std::shared_ptr<const Session> encoder_, projector_, decoder_;
};

/// The cache capacity allocated for a number of positions.
std::size_t capacity_for(std::size_t needed);

}  // namespace llm2slm::detail

#endif
