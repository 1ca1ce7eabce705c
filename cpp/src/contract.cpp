#include "contract.hpp"

#include <algorithm>

#include "error.hpp"

namespace llm2slm::detail {
namespace {

Axis dynamic(const char* name) { return {name, 0}; }
Axis fixed(std::int64_t size) { return {{}, size}; }

TensorSpec ids(const char* name, std::vector<Axis> axes) { return {name, "int64", std::move(axes)}; }
TensorSpec floats(const char* name, std::vector<Axis> axes) { return {name, "float32", std::move(axes)}; }

// The keys and values of every layer, by a name with the layer's number in it.
template <typename Make>
void for_each_layer(const PairShape& shape, Make&& make) {
  for (std::int64_t layer = 0; layer < shape.num_hidden_layers; ++layer) {
    for (const char* kind : {"key", "value"}) make(std::to_string(layer), kind);
  }
}

std::vector<TensorSpec> cross_attention(const PairShape& shape, const std::string& dtype) {
  std::vector<TensorSpec> specs;
  for_each_layer(shape, [&](const std::string& layer, const char* kind) {
    specs.push_back({"past_key_values." + layer + ".encoder." + kind,
                     dtype,
                     {dynamic("batch"), fixed(shape.num_key_value_heads), dynamic("context"), fixed(shape.head_dim)}});
  });
  return specs;
}

GraphSpec projector_spec(const PairShape& shape, const std::string& dtype) {
  GraphSpec spec;
  spec.inputs = {floats(kHiddenStates, {dynamic("batch"), dynamic("prompt"), fixed(shape.encoder_hidden_size)}),
                 ids(kAttentionMask, {dynamic("batch"), dynamic("prompt")})};
  if (shape.projector_reads_ids()) spec.inputs.push_back(ids(kInputIds, {dynamic("batch"), dynamic("prompt")}));
  if (shape.decoder_only()) {
    spec.outputs = {floats(kPromptEmbeds, {dynamic("batch"), dynamic("context"), fixed(shape.hidden_size)})};
  } else {
    spec.outputs = cross_attention(shape, dtype);
  }
  return spec;
}

GraphSpec decoder_spec(const PairShape& shape, const std::string& dtype) {
  GraphSpec spec;
  spec.inputs = {ids(kInputIds, {dynamic("batch"), dynamic("sequence_length")})};
  if (shape.decoder_only()) {
    spec.inputs.push_back(floats(kPromptEmbeds, {dynamic("batch"), dynamic("embeds_length"), fixed(shape.hidden_size)}));
    spec.inputs.push_back(ids(kPastLength, {dynamic("batch")}));
    spec.inputs.push_back(ids(kLogitsToKeep, {dynamic("batch"), dynamic("num_logits")}));
  } else {
    spec.inputs.push_back(ids(kEncoderAttentionMask, {dynamic("batch"), dynamic("context")}));
    spec.inputs.push_back(ids(kPastLength, {dynamic("batch")}));
  }
  spec.outputs = {floats(kLogits, {dynamic("batch"), dynamic(shape.decoder_only() ? "num_logits" : "sequence_length"), fixed(shape.vocab_size)})};
  for (const StateSpec& part : state_spec(shape, dtype)) {
    spec.inputs.push_back(part.past);
    spec.outputs.push_back(part.present);
  }
  if (!shape.decoder_only()) {
    for (TensorSpec& tensor : cross_attention(shape, dtype)) spec.inputs.push_back(std::move(tensor));
  }
  return spec;
}

}  // namespace

std::string text_of(const TensorSpec& tensor) {
  std::string text = tensor.name + " " + tensor.dtype + " [";
  for (std::size_t i = 0; i < tensor.axes.size(); ++i) {
    const Axis& axis = tensor.axes[i];
    text += (i == 0 ? "" : ", ") + (axis.name.empty() ? std::to_string(axis.size) : axis.name);
  }
  return text + "]";
}

std::size_t StateSpec::growing_axis() const {
  const auto found = std::find(past.axes.begin(), past.axes.end(), dynamic("capacity"));
  if (found != past.axes.end()) return static_cast<std::size_t>(found - past.axes.begin());
  throw failure(ErrorCode::bundle, "The decoder's state " + text_of(past) + " has no axis `capacity`.", {}, "build the bundle again");
}

std::vector<StateSpec> state_spec(const PairShape& shape, const std::string& dtype) {
  const std::string part = shape.decoder_only() ? "." : ".decoder.";
  const std::vector<Axis> axes{dynamic("batch"), fixed(shape.num_key_value_heads), dynamic("capacity"), fixed(shape.head_dim)};
  std::vector<StateSpec> specs;
  for_each_layer(shape, [&](const std::string& layer, const char* kind) {
    const std::string name = layer + part + kind;
    specs.push_back({{"past_key_values." + name, dtype, axes}, {"present." + name, dtype, axes}});
  });
  return specs;
}

GraphSpec graph_spec(const std::string& name, const PairShape& shape, const std::string& dtype) {
  if (name == "projector") return projector_spec(shape, dtype);
  if (name == "decoder") return decoder_spec(shape, dtype);
  return {{ids(kInputIds, {dynamic("batch"), dynamic("prompt")}), ids(kAttentionMask, {dynamic("batch"), dynamic("prompt")})},
          {floats(kHiddenStates, {dynamic("batch"), dynamic("prompt"), fixed(shape.encoder_hidden_size)})}};
}

}  // namespace llm2slm::detail
