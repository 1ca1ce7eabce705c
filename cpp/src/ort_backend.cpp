#include "ort_backend.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "error.hpp"

namespace llm2slm::detail {
namespace {

constexpr std::size_t kRows = 0;  // the axis `batch`

std::int64_t signed_size(std::size_t size) { return static_cast<std::int64_t>(size); }

std::size_t unsigned_size(std::int64_t size) { return static_cast<std::size_t>(size); }

std::size_t longest_of(const std::vector<std::size_t>& lengths) { return *std::max_element(lengths.begin(), lengths.end()); }

void check_versions(const Ort& ort, const std::filesystem::path& directory, const Manifest& manifest) {
  std::vector<std::string> too_new;
  std::string newest = "0";
  for (const auto& [name, graph] : manifest.graphs) {
    const auto needed = graph.minimum_runtime.find("onnxruntime");
    if (needed == graph.minimum_runtime.end() || !older(ort.version(), needed->second)) continue;
    too_new.push_back(graph.file + ": needs onnxruntime " + needed->second + ", found " + ort.version());
    if (older(newest, needed->second)) newest = needed->second;
  }
  if (too_new.empty()) return;
  too_new.push_back("found: " + ort.found_at());
  throw failure(ErrorCode::runtime, "The bundle " + directory.string() + " needs a newer ONNX Runtime than " + ort.version() + ".",
                too_new, "use ONNX Runtime " + newest + " or newer");
}

std::shared_ptr<Tensor> taken(const std::shared_ptr<const Ort>& ort, const Tensor& from, const std::vector<std::size_t>& rows) {
  std::vector<std::int64_t> shape = from.shape();
  const std::size_t bytes = shape[kRows] == 0 ? 0 : from.bytes() / unsigned_size(shape[kRows]);
  shape[kRows] = signed_size(rows.size());
  std::shared_ptr<Tensor> to = from.is_float() ? Tensor::floats(ort, shape) : Tensor::ids(ort, shape);
  char* out = from.is_float() ? reinterpret_cast<char*>(to->float_data()) : reinterpret_cast<char*>(to->id_data());
  for (std::size_t row = 0; row < rows.size() && bytes > 0; ++row) {
    std::memcpy(out + row * bytes, static_cast<const char*>(from.data()) + rows[row] * bytes, bytes);
  }
  return to;
}

}  // namespace

Conditioning Conditioning::of(std::size_t prompt, const std::shared_ptr<const Ort>& ort) const {
  if (prompt_tokens.size() == 1) return *this;
  Conditioning one;
  for (const auto& [name, tensor] : tensors) one.tensors[name] = taken(ort, *tensor, {prompt});
  one.prompt_tokens = {prompt_tokens[prompt]};
  return one;
}

std::size_t capacity_for(std::size_t needed) {
  // A step reads the whole capacity, and growing copies the cache. Growing by a sixteenth to an eighth reads 5 % too much on
  // average, and copies each position about a dozen times in all, while every step reads it.
  std::size_t bits = 0;
  for (std::size_t left = needed; left > 0; left >>= 1) ++bits;
  const std::size_t step = std::size_t{1} << std::max<std::size_t>(5, bits < 4 ? 0 : bits - 4);
  return (needed + step - 1) / step * step;
}

DecoderState::DecoderState(std::shared_ptr<const Session> session, const Manifest& manifest, const Conditioning& conditioning)
    : manifest_(manifest),
      ort_(session->ort()),
      binding_(std::move(session)),
      sources_(conditioning.prompt_tokens.size()),
      lengths_(conditioning.prompt_tokens.size()) {
  std::iota(sources_.begin(), sources_.end(), std::size_t{0});
  const std::size_t each = manifest.shape.context_per_token();
  for (const std::size_t tokens : conditioning.prompt_tokens) contexts_.push_back(tokens * each);
  for (const auto& [name, tensor] : conditioning.tensors) {
    binding_.input(name, tensor);
    conditioning_names_.push_back(name);
  }
  for (const TensorSpec& spec : manifest.graph("projector").outputs) {
    for (std::size_t axis = 0; axis < spec.axes.size(); ++axis) {
      if (spec.axes[axis].name == "context") context_ = unsigned_size(conditioning.tensors.at(spec.name)->shape()[axis]);
    }
  }
}

Positions DecoderState::prefill() {
  const std::size_t batch = contexts_.size();
  const std::int64_t rows = signed_size(batch);
  if (manifest_.shape.decoder_only()) {
    std::shared_ptr<Tensor> last = Tensor::ids(ort_, {rows, 1});
    for (std::size_t row = 0; row < batch; ++row) last->id_data()[row] = signed_size(contexts_[row]) - 1;
    binding_.input(kLogitsToKeep, std::move(last));
    // The call writes the padding too.
    const Positions logits = decode({}, context_);
    // Each row's next call overwrites the padding on the right of its prompt.
    lengths_ = contexts_;
    bind_step_inputs(1);
    return logits;
  }
  std::shared_ptr<Tensor> mask = Tensor::ids(ort_, {rows, signed_size(context_)});
  for (std::size_t row = 0; row < batch; ++row) std::fill_n(mask->id_data() + row * context_, contexts_[row], 1);
  binding_.input(kEncoderAttentionMask, mask);
  return step(Ids(batch, *manifest_.special_ids.decoder_start));
}

Positions DecoderState::step(const Ids& ids) {
  const std::size_t tokens = ids.size() / sources_.size();
  if (manifest_.shape.decoder_only() && binding_.bound(kLogitsToKeep).shape() != shape_of(tokens)) bind_step_inputs(tokens);
  const Positions logits = decode(ids, 0);
  for (std::size_t& length : lengths_) length += tokens;
  return logits;
}

std::vector<std::int64_t> DecoderState::shape_of(std::size_t tokens) const {
  return {signed_size(sources_.size()), signed_size(tokens)};
}

// One decoder call on prompt embeddings (or none) followed by ids [rows, tokens] (or none), written behind each row's length.
Positions DecoderState::decode(const Ids& ids, std::size_t embeds_length) {
  const std::size_t batch = sources_.size(), fresh = ids.size() / batch;
  make_room(embeds_length + fresh);
  const std::vector<std::int64_t> shape = shape_of(fresh);
  const auto vocab = unsigned_size(manifest_.shape.vocab_size);
  // The prompt pass of a decoder-only SLM has no ids, and gives the logits of one position.
  const std::size_t kept = std::max<std::size_t>(fresh, 1);
  if (logits_ == nullptr || binding_.bound(kInputIds).shape() != shape) {
    binding_.input(kInputIds, Tensor::ids(ort_, shape));
    binding_.input(kPastLength, Tensor::ids(ort_, {signed_size(batch)}));
    logits_ = Tensor::floats(ort_, {signed_size(batch), signed_size(kept), manifest_.shape.vocab_size});
    binding_.output(kLogits, logits_);
  }
  std::copy(ids.begin(), ids.end(), binding_.bound(kInputIds).id_data());
  std::transform(lengths_.begin(), lengths_.end(), binding_.bound(kPastLength).id_data(), signed_size);
  binding_.run();
  return {logits_->float_data(), batch, kept, kept, vocab};
}

std::vector<std::int64_t> DecoderState::cache_shape(const StateSpec& spec) const {
  const std::size_t growing = spec.growing_axis();
  std::vector<std::int64_t> shape;
  for (const Axis& axis : spec.past.axes) shape.push_back(axis.size);
  shape[kRows] = signed_size(sources_.size());
  shape[growing] = signed_size(capacity_);
  return shape;
}

// Make room in the cache for `count` more positions of each row, filled with zeros: attention multiplies unwritten positions by 0.
void DecoderState::make_room(std::size_t count) {
  const std::size_t needed = longest_of(lengths_) + count;
  if (needed <= capacity_) return;
  const bool written = capacity_ > 0;
  capacity_ = capacity_for(needed);
  std::vector<std::size_t> rows(sources_.size());
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  for (const StateSpec& spec : manifest_.state) {
    std::shared_ptr<Tensor> roomier = Tensor::floats(ort_, cache_shape(spec));
    if (written) copy_written(spec, binding_.bound(spec.past.name), rows, *roomier);
    hold(spec, std::move(roomier));
  }
  spare_.clear();
}

// Bind a part of the cache as past and, in place, as present.
void DecoderState::hold(const StateSpec& spec, std::shared_ptr<Tensor> tensor) {
  binding_.input(spec.past.name, tensor);
  binding_.output(spec.present.name, std::move(tensor));
}

// Bind what a step of a decoder-only SLM reads: no prompt embeddings, and that it gives the logits of all its tokens.
void DecoderState::bind_step_inputs(std::size_t tokens) {
  const std::int64_t rows = signed_size(sources_.size());
  binding_.input(kPromptEmbeds, Tensor::floats(ort_, {rows, 0, manifest_.shape.hidden_size}));
  std::shared_ptr<Tensor> kept = Tensor::ids(ort_, shape_of(tokens));
  for (std::size_t at = 0; at < kept->size(); ++at) kept->id_data()[at] = signed_size(at % tokens);
  binding_.input(kLogitsToKeep, std::move(kept));
}

void DecoderState::select(const std::vector<std::size_t>& rows) {
  bool same = rows.size() == sources_.size();
  for (std::size_t row = 0; same && row < rows.size(); ++row) same = rows[row] == row;
  if (same) return;
  std::vector<std::size_t> sources, lengths;
  for (const std::size_t row : rows) {
    sources.push_back(sources_[row]);
    lengths.push_back(lengths_[row]);
  }
  // Only changed tensors are copied. Reordered beams of a prompt change only the cache.
  const bool reads_others = sources != sources_;
  if (rows.size() != sources_.size()) spare_.clear();
  sources_ = std::move(sources);
  lengths_ = std::move(lengths);
  for (const StateSpec& spec : manifest_.state) reorder(spec, rows);
  if (!reads_others) return;
  if (manifest_.shape.decoder_only()) {
    bind_step_inputs(1);
    return;
  }
  for (const std::string& name : conditioning_names_) binding_.input(name, taken(ort_, binding_.bound(name), rows));
  binding_.input(kEncoderAttentionMask, taken(ort_, binding_.bound(kEncoderAttentionMask), rows));
}

// Reorder the rows of one cache tensor.
void DecoderState::reorder(const StateSpec& spec, const std::vector<std::size_t>& rows) {
  std::shared_ptr<Tensor>& spare = spare_[spec.past.name];
  if (spare == nullptr) spare = Tensor::floats(ort_, cache_shape(spec));
  const std::shared_ptr<Tensor> before = binding_.shared(spec.past.name);
  copy_written(spec, *before, rows, *spare);
  hold(spec, spare);
  // A buffer for another number of rows cannot be reused.
  if (before->shape() == spare->shape()) {
    spare = before;
  } else {
    spare.reset();
  }
}

// Copy rows of one cache tensor, in this order, to the state's rows in another: only occupied positions, for attention multiplies
// the others by 0.
void DecoderState::copy_written(const StateSpec& spec, const Tensor& from, const std::vector<std::size_t>& rows, Tensor& to) const {
  const std::size_t growing = spec.growing_axis(), capacity = unsigned_size(from.shape()[growing]);
  // A row is `blocks` blocks of consecutive positions, one for each index of the axes between; a position is `width` numbers.
  std::size_t blocks = 1, width = 1;
  for (std::size_t axis = kRows + 1; axis < spec.past.axes.size(); ++axis) {
    if (axis < growing) blocks *= unsigned_size(spec.past.axes[axis].size);
    if (axis > growing) width *= unsigned_size(spec.past.axes[axis].size);
  }
  for (std::size_t row = 0; row < rows.size(); ++row) {
    for (std::size_t block = 0; block < blocks; ++block) {
      std::memcpy(to.float_data() + (row * blocks + block) * capacity_ * width,
                  from.float_data() + (rows[row] * blocks + block) * capacity * width, lengths_[row] * width * sizeof(float));
    }
  }
}

OrtBackend::OrtBackend(std::shared_ptr<const Ort> ort, const std::filesystem::path& directory, const Manifest& manifest,
                       const Options& options, std::shared_ptr<const Session> encoder)
    : ort_(std::move(ort)), projector_reads_ids_(manifest.shape.projector_reads_ids()), encoder_(std::move(encoder)) {
  check_versions(*ort_, directory, manifest);
  for (const TensorSpec& output : manifest.graph("projector").outputs) projector_outputs_.push_back(output.name);
  projector_specs_ = manifest.graph("projector").outputs;
  context_per_token_ = manifest.shape.context_per_token();
  const auto open = [&](const char* name) {
    const GraphEntry& entry = manifest.graph(name);
    auto session = std::make_shared<const Session>(ort_, directory / entry.file, name, options.threads);
    session->check_signature(entry, name);
    return session;
  };
  if (options.part != Part::writer) {
    if (encoder_ == nullptr) encoder_ = open("encoder");
    projector_ = open("projector");
  }
  if (options.part != Part::reader) decoder_ = open("decoder");
}

const Session& OrtBackend::opened(const std::shared_ptr<const Session>& session, const char* name) const {
  if (session == nullptr) {
    throw failure(ErrorCode::usage, std::string("The ") + name + " graph is not open.", {},
                  "open the pair with Options::part that has it");
  }
  return *session;
}

std::shared_ptr<Tensor> OrtBackend::encode(const std::shared_ptr<Tensor>& input_ids,
                                           const std::shared_ptr<Tensor>& mask) const {
  return opened(encoder_, "encoder").run({{kInputIds, input_ids}, {kAttentionMask, mask}}, {kHiddenStates}).at(kHiddenStates);
}

Tensors OrtBackend::project(const std::shared_ptr<Tensor>& hidden, const std::shared_ptr<Tensor>& input_ids,
                            const std::shared_ptr<Tensor>& mask) const {
  Tensors inputs{{kHiddenStates, hidden}, {kAttentionMask, mask}};
  if (projector_reads_ids_) inputs[kInputIds] = input_ids;
  Tensors outputs = opened(projector_, "projector").run(inputs, projector_outputs_);
  // Dynamic axes are checked at run time, because rows are copied by them.
  const std::int64_t batch = mask->shape()[kRows], context = mask->shape()[1] * signed_size(context_per_token_);
  for (const TensorSpec& spec : projector_specs_) {
    std::vector<std::int64_t> expected;
    for (const Axis& axis : spec.axes) expected.push_back(axis.name.empty() ? axis.size : axis.name == "batch" ? batch : context);
    const Tensor& got = *outputs.at(spec.name);
    if (got.is_float() && got.shape() == expected) continue;
    throw failure(ErrorCode::bundle, "The projector graph of the bundle gives " + spec.name + " another shape than its prompts have.",
                  {}, "build the bundle again");
  }
  return outputs;
}

std::unique_ptr<DecoderState> OrtBackend::decoder(const Manifest& manifest, const Conditioning& conditioning) const {
  opened(decoder_, "decoder");
  return std::make_unique<DecoderState>(decoder_, manifest, conditioning);
}

}  // namespace llm2slm::detail
