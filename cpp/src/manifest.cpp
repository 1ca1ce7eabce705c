#include "manifest.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "bounded_json.hpp"
#include "error.hpp"
#include "manifest_rules.hpp"
#include "regular_file.hpp"
#include "sha256.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

using Json = nlohmann::json;

// All problems, so that they can be fixed at once.
using Problems = std::vector<std::string>;

struct CacheEntry {
  std::vector<StateSpec> state;
};

// Values that this library does not use.
struct Source {};
struct ParityRow {};
struct Parity {};
struct LlmLayer {};
struct EngineLimits {};

constexpr std::size_t kProblemsShown = 10;
constexpr std::size_t kDigestDigits = 64;
constexpr const char* kCopyAgain = "copy the bundle again, or build it again";
// What this library runs; fp16 is not among them: its caches are float16.
constexpr std::array<const char*, 5> kPrecisions{"fp32", "bf16", "int8", "int4", "w8a8"};
constexpr std::size_t kLongestVersion = 64;

// The range of a whole number.
struct Range {
  std::int64_t least, most;
};
constexpr Range kSize{1, std::numeric_limits<std::int32_t>::max()};
constexpr Range kCount{0, std::numeric_limits<std::int32_t>::max()};
constexpr Range kId = kCount;
constexpr Range kBytes{0, (std::int64_t{1} << 62) - 1};

void parse(const Json& value, const std::string& at, Problems& problems, std::string& out) {
  if (value.is_string()) {
    out = value.get<std::string>();
  } else {
    problems.push_back(at + ": must be a string");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, bool& out) {
  if (value.is_boolean()) {
    out = value.get<bool>();
  } else {
    problems.push_back(at + ": must be true or false");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, std::int64_t& out) {
  if (value.is_number_integer()) {
    out = value.get<std::int64_t>();
  } else {
    problems.push_back(at + ": must be a whole number");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, double& out) {
  if (value.is_number()) {
    out = value.get<double>();
  } else {
    problems.push_back(at + ": must be a number");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, EarlyStopping& out) {
  if (value.is_boolean()) {
    out = value.get<bool>() ? EarlyStopping::yes : EarlyStopping::no;
  } else if (value == "never") {
    out = EarlyStopping::never;
  } else {
    problems.push_back(at + ": must be true, false or \"never\"");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, Axis& out) {
  if (value.is_string()) {
    out.name = value.get<std::string>();
    return;
  }
  parse(value, at, problems, out.size);
}

template <typename T>
void parse(const Json& value, const std::string& at, Problems& problems, std::optional<T>& out) {
  if (value.is_null()) return;
  out.emplace();
  parse(value, at, problems, *out);
}

void parse(const Json& value, const std::string& at, Problems& problems, TensorSpec& out);
void parse(const Json& value, const std::string& at, Problems& problems, StateSpec& out);
void parse(const Json& value, const std::string& at, Problems& problems, GraphEntry& out);
void parse(const Json& value, const std::string& at, Problems& problems, FileEntry& out);
void parse(const Json& value, const std::string& at, Problems& problems, PairShape& out);
void parse(const Json& value, const std::string& at, Problems& problems, TokenizerEntry& out);
void parse(const Json& value, const std::string& at, Problems& problems, SpecialIds& out);
void parse(const Json& value, const std::string& at, Problems& problems, GenerationDefaults& out);
void parse(const Json& value, const std::string& at, Problems& problems, CacheEntry& out);
void parse(const Json& value, const std::string& at, Problems& problems, Source& out);
void parse(const Json& value, const std::string& at, Problems& problems, ParityRow& out);
void parse(const Json& value, const std::string& at, Problems& problems, Parity& out);
void parse(const Json& value, const std::string& at, Problems& problems, LlmLayer& out);
void parse(const Json& value, const std::string& at, Problems& problems, Bounds& out);
void parse(const Json& value, const std::string& at, Problems& problems, EngineEntry& out);
void parse(const Json& value, const std::string& at, Problems& problems, EngineLimits& out);
void parse(const Json& value, const std::string& at, Problems& problems, EngineSet& out);
void parse(const Json& value, const std::string& at, Problems& problems, Manifest& out);

template <typename T>
void parse(const Json& value, const std::string& at, Problems& problems, std::map<std::string, T>& out);

template <typename T>
void parse(const Json& value, const std::string& at, Problems& problems, std::vector<T>& out) {
  if (!value.is_array()) {
    problems.push_back(at + ": must be a list");
    return;
  }
  for (std::size_t i = 0; i < value.size(); ++i) {
    out.emplace_back();
    parse(value[i], at + "." + std::to_string(i), problems, out.back());
  }
}

template <typename T>
void parse(const Json& value, const std::string& at, Problems& problems, std::map<std::string, T>& out) {
  if (!value.is_object()) {
    problems.push_back(at + ": must be an object");
    return;
  }
  for (const auto& [name, item] : value.items()) parse(item, at + "." + name, problems, out[name]);
}

// Whether whole numbers lie within a range.
void check_range(std::int64_t value, const std::string& at, Range range, Problems& problems) {
  if (value >= range.least && value <= range.most) return;
  problems.push_back(at + ": must be from " + std::to_string(range.least) + " to " + std::to_string(range.most) + ", got " +
                     std::to_string(value));
}

template <typename T>
void check_range(const std::optional<T>& value, const std::string& at, Range range, Problems& problems) {
  if (value) check_range(*value, at, range, problems);
}

template <typename T>
void check_range(const std::vector<T>& values, const std::string& at, Range range, Problems& problems) {
  for (std::size_t i = 0; i < values.size(); ++i) check_range(values[i], at + "." + std::to_string(i), range, problems);
}

void check_version(const std::string& text, const std::string& at, Problems& problems) {
  if (code_point_count(text) > kLongestVersion) {
    problems.push_back(at + ": must have at most " + std::to_string(kLongestVersion) + " characters");
  }
}

template <typename T>
void check_names(const std::map<std::string, T>& values, const std::set<std::string>& names, const std::string& at,
                 Problems& problems) {
  for (const auto& [name, value] : values) {
    if (names.count(name) == 0) problems.push_back(at + "." + name + ": is not known to this release");
  }
}

std::string quoted_list(const std::vector<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "'" : ", '") + value + "'";
  return text;
}

// Reads the fields of one object. Missing, invalid and unknown fields are problems.
class Fields {
 public:
  Fields(const Json& object, std::string at, Problems& problems)
      : object_(object), at_(std::move(at)), problems_(problems) {
    if (!object.is_object()) problems.push_back((at_.empty() ? "the file" : at_) + ": must be an object");
  }

  template <typename T>
  Fields& required(const char* name, T& out) {
    const Json* value = find(name);
    if (value != nullptr) {
      parse(*value, path(name), problems_, out);
    } else if (object_.is_object()) {
      problems_.push_back(path(name) + ": is missing");
    }
    return *this;
  }

  template <typename T>
  Fields& optional(const char* name, T& out) {
    if (const Json* value = find(name)) parse(*value, path(name), problems_, out);
    return *this;
  }

  /// A whole number, or several, within a range.
  template <typename T>
  Fields& required(const char* name, T& out, Range range) {
    required(name, out);
    if (find(name) != nullptr) check_range(out, path(name), range, problems_);
    return *this;
  }

  template <typename T>
  Fields& optional(const char* name, T& out, Range range) {
    optional(name, out);
    if (find(name) != nullptr) check_range(out, path(name), range, problems_);
    return *this;
  }

  Fields& version(const char* name, std::string& out) {
    required(name, out);
    check_version(out, path(name), problems_);
    return *this;
  }

  /// One of some words.
  Fields& word(const char* name, std::string& out, const std::vector<std::string>& words) {
    required(name, out);
    return among(name, out, words);
  }

  Fields& among(const char* name, const std::string& value, const std::vector<std::string>& words) {
    if (find(name) != nullptr && find(name)->is_string() && std::find(words.begin(), words.end(), value) == words.end()) {
      problems_.push_back(path(name) + ": must be one of " + quoted_list(words) + ", got '" + value + "'");
    }
    return *this;
  }

  void done() {
    if (!object_.is_object()) return;
    for (const auto& [name, value] : object_.items()) {
      if (seen_.count(name) == 0) problems_.push_back(path(name) + ": is not known to this release");
    }
  }

 private:
  const Json* find(const std::string& name) {
    seen_.insert(name);
    if (!object_.is_object()) return nullptr;
    const auto found = object_.find(name);
    return found == object_.end() ? nullptr : &*found;
  }

  std::string path(const std::string& name) const { return at_.empty() ? name : at_ + "." + name; }

  const Json& object_;
  std::string at_;
  Problems& problems_;
  std::set<std::string> seen_;
};

void parse(const Json& value, const std::string& at, Problems& problems, TensorSpec& out) {
  Fields(value, at, problems)
      .required("name", out.name)
      .word("dtype", out.dtype, {"int64", "int32", "float32", "float16", "bfloat16"})
      .required("axes", out.axes)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, StateSpec& out) {
  Fields(value, at, problems).required("past", out.past).required("present", out.present).done();
}

void parse(const Json& value, const std::string& at, Problems& problems, GraphEntry& out) {
  Fields(value, at, problems)
      .required("file", out.file)
      .optional("data", out.data)
      .word("precision", out.precision, {kPrecisions.begin(), kPrecisions.end()})
      .optional("block_size", out.block_size, kSize)
      .optional("quantize_lm_head", out.quantize_lm_head)
      .required("opset", out.opset, kSize)
      .required("minimum_runtime", out.minimum_runtime)
      .optional("bytes_read", out.bytes_read, kBytes)
      .required("inputs", out.inputs)
      .required("outputs", out.outputs)
      .done();
  for (const auto& [runtime, version] : out.minimum_runtime) check_version(version, at + ".minimum_runtime." + runtime, problems);
}

void parse(const Json& value, const std::string& at, Problems& problems, FileEntry& out) {
  Fields(value, at, problems)
      .required("path", out.path)
      .required("bytes", out.bytes, kBytes)
      .required("sha256", out.sha256)
      .done();
  const bool hash = out.sha256.size() == kDigestDigits && out.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!hash) problems.push_back(at + ".sha256: must be 64 hexadecimal digits");
}

void parse(const Json& value, const std::string& at, Problems& problems, PairShape& out) {
  Fields(value, at, problems)
      .word("slm_kind", out.slm_kind, {"encoder-decoder", "decoder-only"})
      .word("fusion", out.fusion, {"add", "replace", "prefix", "cross_attention"})
      .required("encoder_hidden_size", out.encoder_hidden_size)
      .required("hidden_size", out.hidden_size)
      .required("num_hidden_layers", out.num_hidden_layers)
      .required("num_key_value_heads", out.num_key_value_heads)
      .required("head_dim", out.head_dim)
      .required("vocab_size", out.vocab_size)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, TokenizerEntry& out) {
  bool stand_in = false;
  Fields(value, at, problems)
      .word("strategy", out.strategy, {"shared", "llm"})
      .required("llm", out.llm)
      .required("slm", out.slm)
      .required("slm_size", out.slm_size, kSize)
      .optional("stand_in", stand_in)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, SpecialIds& out) {
  Fields(value, at, problems)
      .required("prompt_pad", out.prompt_pad, kId)
      .required("pad", out.pad, kId)
      .required("eos", out.eos, kId)
      .required("decoder_start", out.decoder_start, kId)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, GenerationDefaults& out) {
  Fields(value, at, problems)
      .required("max_new_tokens", out.max_new_tokens, {1, kMostNewTokens})
      .optional("min_new_tokens", out.min_new_tokens, {0, kMostNewTokens})
      .optional("do_sample", out.do_sample)
      .optional("num_beams", out.num_beams, {1, kMostRows})
      .optional("num_return_sequences", out.num_return_sequences, {1, kMostRows})
      .optional("length_penalty", out.length_penalty)
      .optional("early_stopping", out.early_stopping)
      .optional("temperature", out.temperature)
      .optional("top_k", out.top_k, kCount)
      .optional("top_p", out.top_p)
      .optional("min_p", out.min_p)
      .optional("typical_p", out.typical_p)
      .optional("repetition_penalty", out.repetition_penalty)
      .optional("no_repeat_ngram_size", out.no_repeat_ngram_size, kCount)
      .optional("bad_words_ids", out.bad_words_ids, kId)
      .optional("forced_bos_token_id", out.forced_bos_token_id, kId)
      .optional("forced_eos_token_id", out.forced_eos_token_id, kId)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, CacheEntry& out) {
  Fields(value, at, problems).required("state", out.state).done();
}

// The following is not used by this library, but validated: it refuses what the Python package refuses.

void parse(const Json& value, const std::string& at, Problems& problems, Source& /*out*/) {
  std::string model, model_type, weights;
  std::optional<std::string> revision;
  std::int64_t parameters = 0;
  std::optional<std::int64_t> seed;
  Fields(value, at, problems)
      .required("model", model)
      .required("revision", revision)
      .required("model_type", model_type)
      .required("parameters", parameters, kBytes)
      .word("weights", weights, {"pretrained", "random"})
      .optional("seed", seed)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, ParityRow& /*out*/) {
  std::string graph, text;
  double number = 0;
  std::optional<double> float32_error;
  bool passed = false;
  Fields(value, at, problems)
      .word("graph", graph, {"encoder", "projector", "decoder", "pair"})
      .required("case", text)
      .required("tensor", text)
      .required("measure", text)
      .required("value", number)
      .required("tolerance", number)
      .required("passed", passed)
      .optional("float32_error", float32_error)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, Parity& /*out*/) {
  std::vector<ParityRow> rows;
  Fields(value, at, problems).required("rows", rows).done();
}

void parse(const Json& value, const std::string& at, Problems& problems, Bounds& out) {
  Fields(value, at, problems)
      .required("minimum", out.minimum, kCount)
      .required("optimum", out.optimum, kCount)
      .required("maximum", out.maximum, kCount)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, EngineEntry& out) {
  std::string source, precision;
  std::vector<TensorSpec> outputs;
  std::map<std::string, std::string> aliases;
  Fields(value, at, problems)
      .required("file", out.file)
      .required("source", source)
      .word("precision", precision, {"fp32", "fp16", "bf16", "int8", "int4"})
      .required("inputs", out.inputs)
      .required("outputs", outputs)
      .required("profiles", out.profiles)
      .optional("aliases", aliases)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, EngineLimits& /*out*/) {
  std::int64_t size = 0;
  std::vector<std::int64_t> buckets;
  Fields(value, at, problems)
      .required("batch", size, kSize)
      .required("prompt", size, kSize)
      .required("new", size, kSize)
      .required("capacity", size, kCount)
      .optional("prompt_buckets", buckets, kSize)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, EngineSet& out) {
  std::string variant, version, driver;
  std::vector<std::string> capabilities;
  std::optional<std::string> device;
  EngineLimits limits;
  Fields(value, at, problems)
      .word("variant", variant, {"tensorrt", "tensorrt-rtx"})
      .version("version", version)
      .required("compute_capabilities", capabilities)
      .optional("device", device)
      .version("driver", driver)
      .required("limits", limits)
      .required("graphs", out.graphs)
      .done();
  for (const std::string& capability : capabilities) check_version(capability, at + ".compute_capabilities", problems);
  check_names(out.graphs, {"encoder", "projector", "decoder"}, at + ".graphs", problems);
}

void parse(const Json& value, const std::string& at, Problems& problems, LlmLayer& /*out*/) {
  std::int64_t layer = 0;
  std::vector<std::int64_t> layers;
  if (value.is_array()) {
    parse(value, at, problems, layers);
  } else {
    parse(value, at, problems, layer);
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, Manifest& out) {
  std::string format = "llm2slm-bundle";
  std::int64_t schema = kSchemaVersion;
  CacheEntry cache;
  std::map<std::string, Source> sources;
  std::map<std::string, std::string> tool_versions, weights;
  bool trained = false;
  Parity parity;
  LlmLayer layer;
  Fields fields(value, at, problems);
  fields.optional("format", format)
      .among("format", format, {"llm2slm-bundle"})
      .optional("schema_version", schema, {kSchemaVersion, kSchemaVersion})
      .optional("digest", out.digest)
      .required("name", out.name)
      .required("sources", sources)
      .required("trained", trained)
      .required("shape", out.shape)
      .word("fusion", out.fusion, {"add", "replace", "prefix", "cross_attention"})
      .optional("llm_layer", layer)
      .required("prompt_template", out.prompt_template)
      .optional("prompt_special_tokens", out.prompt_special_tokens)
      .optional("prompt_strip", out.prompt_strip)
      .optional("prompt_vocab", out.prompt_vocab, kSize)
      .required("max_prompt_tokens", out.max_prompt_tokens, kSize)
      .optional("max_total_tokens", out.max_total_tokens, kSize)
      .required("tokenizer", out.tokenizer)
      .required("special_ids", out.special_ids)
      .required("generation", out.generation)
      .required("graphs", out.graphs)
      .required("cache", cache)
      .required("parity", parity)
      .required("tool_versions", tool_versions)
      .required("files", out.files)
      .optional("weights", weights)
      .optional("engines", out.engines)
      .optional("head", out.head);
  if (at.empty()) {
    fields.optional("heads", out.heads);
  } else {
    // One level: a head's own manifest has no heads, and files must not be able to nest without end.
    std::map<std::string, std::string> none;
    fields.optional("heads", none);
    if (!none.empty()) problems.push_back(at + ".heads: are the first head's alone");
  }
  fields.done();
  const std::string before = at.empty() ? at : at + ".";
  check_names(sources, {"llm", "slm"}, before + "sources", problems);
  check_names(weights, {"projector", "slm"}, before + "weights", problems);
  check_names(out.graphs, {"encoder", "projector", "decoder"}, before + "graphs", problems);
  for (const auto& [name, source] : sources) out.sources.push_back(name);
  out.state = std::move(cache.state);
}

// The release that wrote a manifest, as evidence; nothing if it has no tool versions.
std::vector<std::string> writer(const Json& raw) {
  const auto versions = raw.find("tool_versions");
  if (versions == raw.end()) return {};
  const auto tool = versions->find("llm2slm-export");
  const bool named = versions->is_object() && tool != versions->end() && tool->is_string();
  return {"it was written by " + (named ? "llm2slm-export " + tool->get<std::string>() : "a newer release")};
}

// Refuse a manifest of another schema, which may have other fields.
void check_schema(const Json& raw, const std::string& path) {
  const auto found = raw.is_object() ? raw.find("schema_version") : raw.end();
  if (!raw.is_object() || found == raw.end() || !found->is_number_integer()) return;
  const auto schema = found->get<std::int64_t>();
  const std::string fact = path + " has schema version " + std::to_string(schema) + "; this release reads ";
  if (schema < kSchemaVersion) {
    throw failure(ErrorCode::bundle, fact + std::to_string(kSchemaVersion) + ".",
                  {"axis and field names have changed since that version"}, "build the bundle again");
  }
  if (schema > kSchemaVersion) {
    throw failure(ErrorCode::bundle, fact + "up to " + std::to_string(kSchemaVersion) + ".", writer(raw),
                  "use a newer release of llm2slm");
  }
}

// The position of the digest's digits in a manifest's bytes; nothing if there is none.
std::optional<std::size_t> digest_place(std::string_view text) {
  constexpr std::string_view kName = "\"digest\":";
  for (std::size_t at = text.find(kName); at != std::string_view::npos; at = text.find(kName, at + 1)) {
    const std::size_t quote = text.find_first_not_of(" \t\n\r\f\v", at + kName.size());
    if (quote == std::string_view::npos || text.size() - quote < kDigestDigits + 2) return std::nullopt;
    const std::string_view digits = text.substr(quote + 1, kDigestDigits);
    const bool hexadecimal = digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
    if (text[quote] == '"' && hexadecimal && text[quote + 1 + kDigestDigits] == '"') return quote + 1;
  }
  return std::nullopt;
}

// Refuse a manifest that was altered, or damaged, after it was written.
void check_digest(std::string_view text, const Json& raw, const std::string& path) {
  const std::optional<std::size_t> place = digest_place(text);
  const auto declared = raw.is_object() ? raw.find("digest") : raw.end();
  const std::string_view digits = place ? text.substr(*place, kDigestDigits) : std::string_view();
  if (!place || !raw.is_object() || declared == raw.end() || *declared != std::string(digits)) {
    throw failure(ErrorCode::bundle, path + " has no valid digest.",
                  {"expected digest: 64 hexadecimal digits after schema_version"}, kCopyAgain);
  }
  Sha256 digest;
  digest.update(text.substr(0, *place));
  digest.update(std::string(kDigestDigits, '0'));
  digest.update(text.substr(*place + kDigestDigits));
  const std::string got = digest.hex();
  if (got == digits) return;
  throw failure(ErrorCode::bundle, path + " has changed since it was written.",
                {"expected sha256 " + std::string(digits.substr(0, 16)) + "…, got " + got.substr(0, 16) + "…"}, kCopyAgain);
}

// The remedy for a manifest that does not validate.
std::string remedy_for(const Manifest& manifest) {
  const bool runs = std::all_of(manifest.graphs.begin(), manifest.graphs.end(), [](const auto& named) {
    const std::string& precision = named.second.precision;
    return precision.empty() || std::find(kPrecisions.begin(), kPrecisions.end(), precision) != kPrecisions.end();
  });
  return runs ? "build the bundle again" : "build the bundle again with --precision fp32, or with bf16, int8 or int4";
}

Json parse_raw(std::string_view text, const std::string& path) {
  try {
    return parse_json(text);
  } catch (const JsonError& error) {
    throw failure(ErrorCode::bundle, path + " cannot be read as JSON.", {error.what()}, kCopyAgain);
  }
}

Manifest parse_fields(const Json& raw, const std::string& path) {
  Problems problems;
  Manifest manifest;
  parse(raw, "", problems, manifest);
  if (problems.empty()) problems = text_problems(raw);
  if (problems.empty()) problems = manifest_problems(manifest);
  if (problems.empty()) return manifest;
  if (problems.size() > kProblemsShown) {
    const std::size_t more = problems.size() - kProblemsShown;
    problems.resize(kProblemsShown);
    problems.push_back("and " + std::to_string(more) + " more");
  }
  throw failure(ErrorCode::bundle, path + " is not a manifest this release can read.", problems, remedy_for(manifest));
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& path) {
  const Json raw = parse_raw(text, path);
  check_schema(raw, path);
  check_digest(text, raw, path);
  return parse_fields(raw, path);
}

Manifest parse_undigested(std::string_view text, const std::string& path) {
  const Json raw = parse_raw(text, path);
  check_schema(raw, path);
  return parse_fields(raw, path);
}

Manifest read_manifest(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / kManifestFile;
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw failure(ErrorCode::bundle, directory.string() + " is not a bundle: it has no " + kManifestFile + ".", {},
                  "give a directory that `llm2slm-export build` wrote");
  }
  std::string text;
  try {
    text = RegularFile(path).content(kMostJsonBytes);
  } catch (const FileError& unreadable) {
    throw failure(ErrorCode::bundle, path.string() + " cannot be read.", {unreadable.what()}, kCopyAgain);
  }
  return parse_manifest(text, path.string());
}

}  // namespace llm2slm::detail
