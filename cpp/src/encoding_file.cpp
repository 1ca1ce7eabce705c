#include "encoding_file.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "bounded_json.hpp"
#include "error.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

constexpr const char* kFormat = "llm2slm-encoding";
constexpr int kVersion = 2;
constexpr std::int64_t kMostId = std::numeric_limits<std::int32_t>::max();

// Numbers as Python's json.dumps writes them.
std::string list_text(const std::vector<std::size_t>& numbers) {
  std::string text = "[";
  for (const std::size_t number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + "]";
}

Error malformed(const std::string& name, const std::string& reason) {
  return failure(ErrorCode::encoding, name + " cannot be read as an encoding.", {reason}, "copy it again, or encode again");
}

std::string metadata(const About& about, const std::string& key, const std::string& name) {
  const auto found = about.find(key);
  if (found == about.end()) throw malformed(name, "its metadata has no " + key);
  return found->second;
}

std::vector<std::size_t> numbers(const About& about, const std::string& key, const std::string& name) {
  nlohmann::json list;
  try {
    list = parse_json(metadata(about, key, name));
  } catch (const JsonError& error) {
    throw malformed(name, key + " is not JSON: " + error.what());
  }
  if (!list.is_array() || list.empty()) throw malformed(name, key + " is not a list of numbers");
  std::vector<std::size_t> found;
  for (const nlohmann::json& number : list) {
    if (!number.is_number_unsigned() || number.get<std::int64_t>() > kMostId) {
      throw malformed(name, key + " is not a list of numbers");
    }
    found.push_back(number.get<std::size_t>());
  }
  return found;
}

void check_format(const About& about, const std::string& name) {
  const auto format = about.find("format");
  if (format == about.end() || format->second != kFormat) {
    throw failure(ErrorCode::encoding, name + " is not an encoding.",
                  {std::string("expected format '") + kFormat + "', got " +
                   (format == about.end() ? "none" : "'" + format->second + "'")},
                  "give a file that save_encoding wrote");
  }
  const std::string version = metadata(about, "version", name);
  const bool digits = !version.empty() && version.size() < 9 && version.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || std::stoi(version) < 1) {
    const std::string shown = version.substr(0, end_of_code_points(version, 20));
    throw malformed(name, "its version is " + python_repr(shown) + ", which is not a positive integer");
  }
  if (std::stoi(version) > kVersion) {
    throw failure(ErrorCode::encoding,
                  name + " has version " + version + " of the format; this release reads up to " + std::to_string(kVersion) + ".",
                  {}, "use a newer release of llm2slm");
  }
}

std::shared_ptr<Tensor> copied(const TensorView& view, const std::shared_ptr<const Ort>& ort) {
  std::shared_ptr<Tensor> tensor = view.is_float ? Tensor::floats(ort, view.shape) : Tensor::ids(ort, view.shape);
  void* to = view.is_float ? static_cast<void*>(tensor->float_data()) : static_cast<void*>(tensor->id_data());
  if (view.bytes > 0) std::memcpy(to, view.data, view.bytes);
  return tensor;
}

// The tensor of a spec, whose dynamic axes have these sizes.
const TensorView& find_tensor(const SafetensorsFile& file, const TensorSpec& spec, std::size_t batch, std::size_t positions,
                              const std::string& name) {
  const auto found = file.tensors.find(spec.name);
  if (found == file.tensors.end()) throw malformed(name, "it has no tensor " + spec.name);
  std::vector<std::int64_t> shape;
  for (const Axis& axis : spec.axes) {
    const std::size_t dynamic = axis.name == "batch" ? batch : positions;
    shape.push_back(axis.name.empty() ? axis.size : static_cast<std::int64_t>(dynamic));
  }
  if (found->second.shape != shape || found->second.is_float != (spec.dtype == "float32")) {
    throw malformed(name, "the tensor " + spec.name + " has another shape than its prompts");
  }
  return found->second;
}

// Values are stored as in memory, without alignment.
template <typename T, typename Accepts>
void check_values(const TensorView& view, const std::string& tensor, const char* wanted, const std::string& name, Accepts&& accepts) {
  const auto* bytes = static_cast<const char*>(view.data);
  for (std::size_t at = 0; at < view.bytes; at += sizeof(T)) {
    T value;
    std::memcpy(&value, bytes + at, sizeof value);
    if (!accepts(value)) throw malformed(name, "the tensor " + tensor + " holds a value that is not a " + wanted);
  }
}

void check_values(const EncodingContent& content, const std::string& name) {
  check_values<std::int64_t>(content.input_ids, kInputIds, "token id", name,
                             [](std::int64_t id) { return id >= 0 && id <= kMostId; });
  for (const auto& [tensor, view] : content.conditioning) {
    check_values<float>(view, tensor, "finite number", name, [](float value) { return std::isfinite(value); });
  }
}

TensorView view_of(const Tensor& tensor) { return {tensor.is_float(), tensor.shape(), tensor.data(), tensor.bytes()}; }

}  // namespace

void save_encoding(const Encoding::Data& encoding, const std::filesystem::path& path, const Manifest& manifest) {
  const EncodingIdentity identity = EncodingIdentity::of(manifest);
  identity.check(encoding.identity, "The encoding");
  const About about{{"format", kFormat},
                    {"version", std::to_string(kVersion)},
                    {"bundle", manifest.name},
                    {"head", manifest.head},
                    {"encoder", identity.encoder},
                    {"projector", identity.projector},
                    {"tokenizer", identity.tokenizer},
                    {"prompt_tokens", list_text(encoding.conditioning.prompt_tokens)},
                    {"dropped_tokens", list_text(encoding.dropped_tokens)}};
  std::map<std::string, TensorView> tensors{{kInputIds, view_of(*encoding.input_ids)}};
  for (const auto& [name, tensor] : encoding.conditioning.tensors) tensors[name] = view_of(*tensor);
  write_tensors(path, tensors, about);
}

EncodingContent check_encoding(const SafetensorsFile& file, const std::string& name, const Manifest& manifest) {
  check_format(file.about, name);
  EncodingContent content;
  content.identity = {metadata(file.about, "encoder", name), metadata(file.about, "projector", name),
                      metadata(file.about, "tokenizer", name)};
  EncodingIdentity::of(manifest).check(content.identity, "The encoding " + name + " (bundle '" + metadata(file.about, "bundle", name) +
                                                             "', head '" + metadata(file.about, "head", name) + "')");
  content.prompt_tokens = numbers(file.about, "prompt_tokens", name);
  content.dropped_tokens = numbers(file.about, "dropped_tokens", name);
  const std::vector<std::size_t>& tokens = content.prompt_tokens;
  const std::size_t batch = tokens.size(), prompt = *std::max_element(tokens.begin(), tokens.end());
  if (content.dropped_tokens.size() != batch || *std::min_element(tokens.begin(), tokens.end()) == 0) {
    throw malformed(name, "prompt_tokens and dropped_tokens do not match");
  }
  if (static_cast<std::int64_t>(prompt) > manifest.max_prompt_tokens) {
    throw malformed(name, "a prompt has " + std::to_string(prompt) + " tokens; the pair accepts at most " +
                              std::to_string(manifest.max_prompt_tokens));
  }
  const TensorSpec ids{kInputIds, "int64", {{"batch", 0}, {"prompt", 0}}};
  content.input_ids = find_tensor(file, ids, batch, prompt, name);
  const std::size_t context = prompt * manifest.shape.context_per_token();
  for (const TensorSpec& spec : manifest.graph("projector").outputs) {
    content.conditioning[spec.name] = find_tensor(file, spec, batch, context, name);
  }
  if (file.tensors.size() != content.conditioning.size() + 1) throw malformed(name, "it has tensors that no encoding of this pair has");
  check_values(content, name);
  return content;
}

std::shared_ptr<const Encoding::Data> parse_encoding(std::string_view text, const std::string& name, const Manifest& manifest,
                                                     const std::shared_ptr<const Ort>& ort) {
  EncodingContent content = check_encoding(parse_tensors(text, name), name, manifest);
  auto data = std::make_shared<Encoding::Data>();
  data->identity = std::move(content.identity);
  data->input_ids = copied(content.input_ids, ort);
  for (const auto& [tensor, view] : content.conditioning) data->conditioning.tensors[tensor] = copied(view, ort);
  data->conditioning.prompt_tokens = std::move(content.prompt_tokens);
  data->dropped_tokens = std::move(content.dropped_tokens);
  return data;
}

}  // namespace llm2slm::detail
