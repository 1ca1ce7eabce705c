#include "manifest.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "error.hpp"
#include "file.hpp"
#include "json_text.hpp"
#include "sha256.hpp"

namespace llm2slm::detail {
namespace {

using Json = nlohmann::json;

// Everything wrong, so that it can be fixed at once.
using Problems = std::vector<std::string>;

struct CacheEntry {
  std::string layout;
  std::vector<StateSpec> state;
};

constexpr std::size_t kProblemsShown = 10;
constexpr std::size_t kDigestDigits = 64;
constexpr const char* kCopyAgain = "copy the bundle again, or build it again";
// What this library runs; fp16 is not among them: its caches are float16.
constexpr std::array<const char*, 5> kPrecisions{"fp32", "bf16", "int8", "int4", "w8a8"};
// Sizes of tensors: within it their products stay in 64 bits.
constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

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
  const bool beyond = value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{1} << 62;
  if (value.is_number_integer() && !beyond) {
    out = value.get<std::int64_t>();
  } else {
    problems.push_back(at + ": must be a whole number");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, std::uint64_t& out) {
  if (value.is_number_unsigned()) {
    out = value.get<std::uint64_t>();
  } else {
    problems.push_back(at + ": must be a whole number, at least 0");
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
  if (out.size < 0 || out.size > kMostSize) problems.push_back(at + ": is no size");
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
void parse(const Json& value, const std::string& at, Problems& problems, Manifest& out);

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

std::string quoted_list(const std::vector<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "'" : ", '") + value + "'";
  return text;
}

// The fields of one object: what is missing, wrong or unknown is a problem.
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

  /// What is known and of no use to this library.
  Fields& ignored(std::initializer_list<const char*> names, bool all_required) {
    for (const char* name : names) {
      if (find(name) == nullptr && all_required && object_.is_object()) problems_.push_back(path(name) + ": is missing");
    }
    return *this;
  }

  Fields& positive(const char* name, std::int64_t& out) {
    required(name, out);
    if (find(name) != nullptr && (out < 1 || out > kMostSize)) problems_.push_back(path(name) + ": must be at least 1");
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
      .word("dtype", out.dtype, {"int64", "float32"})
      .required("axes", out.axes)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, StateSpec& out) {
  Fields(value, at, problems).required("past", out.past).required("present", out.present).done();
  const bool shaped = out.past.axes.size() == 4 && out.past.axes[0].name == "batch" && out.past.axes[2].name == "capacity" &&
                      out.past.axes[1].size > 0 && out.past.axes[3].size > 0 && out.past.dtype == "float32";
  if (!shaped) problems.push_back(at + ".past: must be float32 [batch, heads, capacity, d_head]");
}

void check_inside(const std::string& path, const std::string& at, Problems& problems) {
  const std::filesystem::path given(path);
  const bool up = std::any_of(given.begin(), given.end(), [](const auto& part) { return part == ".."; });
  if (path.empty() || given.is_absolute() || up || path.find('\0') != std::string::npos) {
    problems.push_back(at + ": leaves the bundle, '" + path + "'");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, GraphEntry& out) {
  Fields(value, at, problems)
      .required("file", out.file)
      .optional("data", out.data)
      .word("precision", out.precision, {kPrecisions.begin(), kPrecisions.end()})
      .ignored({"opset"}, true)
      .ignored({"bytes_read", "block_size", "all_layers"}, false)
      .required("minimum_runtime", out.minimum_runtime)
      .required("inputs", out.inputs)
      .required("outputs", out.outputs)
      .done();
  check_inside(out.file, at + ".file", problems);
}

void parse(const Json& value, const std::string& at, Problems& problems, FileEntry& out) {
  Fields(value, at, problems).required("path", out.path).required("bytes", out.bytes).required("sha256", out.sha256).done();
  check_inside(out.path, at + ".path", problems);
}

void parse(const Json& value, const std::string& at, Problems& problems, PairShape& out) {
  Fields(value, at, problems)
      .word("slm_kind", out.slm_kind, {"encoder-decoder", "decoder-only"})
      .word("fusion", out.fusion, {"add", "replace", "prefix", "cross_attention"})
      .positive("d_llm", out.d_llm)
      .positive("d_slm", out.d_slm)
      .positive("layers", out.layers)
      .positive("heads", out.heads)
      .positive("d_head", out.d_head)
      .positive("vocab", out.vocab)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, TokenizerEntry& out) {
  Fields(value, at, problems)
      .word("strategy", out.strategy, {"shared", "llm"})
      .required("llm", out.llm)
      .required("slm", out.slm)
      .positive("slm_size", out.slm_size)
      .ignored({"stand_in"}, false)
      .done();
  check_inside(out.llm, at + ".llm", problems);
  check_inside(out.slm, at + ".slm", problems);
}

void parse(const Json& value, const std::string& at, Problems& problems, SpecialIds& out) {
  Fields(value, at, problems)
      .required("prompt_pad", out.prompt_pad)
      .required("pad", out.pad)
      .required("eos", out.eos)
      .required("decoder_start", out.decoder_start)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, GenerationDefaults& out) {
  Fields(value, at, problems)
      .required("max_new_tokens", out.max_new_tokens)
      .optional("min_new_tokens", out.min_new_tokens)
      .optional("do_sample", out.do_sample)
      .optional("num_beams", out.num_beams)
      .optional("num_return_sequences", out.num_return_sequences)
      .optional("length_penalty", out.length_penalty)
      .optional("early_stopping", out.early_stopping)
      .optional("temperature", out.temperature)
      .optional("top_k", out.top_k)
      .optional("top_p", out.top_p)
      .optional("min_p", out.min_p)
      .optional("typical_p", out.typical_p)
      .optional("repetition_penalty", out.repetition_penalty)
      .optional("no_repeat_ngram_size", out.no_repeat_ngram_size)
      .optional("bad_words_ids", out.bad_words_ids)
      .optional("forced_bos_token_id", out.forced_bos_token_id)
      .optional("forced_eos_token_id", out.forced_eos_token_id)
      .done();
}

void parse(const Json& value, const std::string& at, Problems& problems, CacheEntry& out) {
  Fields(value, at, problems).word("layout", out.layout, {"static"}).required("state", out.state).done();
}

void check_graphs(const Manifest& manifest, const std::string& at, Problems& problems) {
  for (const char* name : {"encoder", "projector", "decoder"}) {
    if (manifest.graphs.count(name) == 0) problems.push_back(at + "graphs." + name + ": is missing");
  }
  for (const auto& [name, graph] : manifest.graphs) {
    if (name != "encoder" && name != "projector" && name != "decoder") {
      problems.push_back(at + "graphs." + name + ": is no graph");
    }
  }
  if (!manifest.shape.decoder_only() && !manifest.special_ids.decoder_start) {
    problems.push_back(at + "special_ids.decoder_start: an encoder-decoder SLM has one");
  }
}

void parse(const Json& value, const std::string& at, Problems& problems, Manifest& out) {
  std::string format = "llm2slm-bundle";
  std::int64_t schema = kSchemaVersion;
  std::string digest, fusion;
  CacheEntry cache;
  Fields fields(value, at, problems);
  fields.optional("format", format)
      .among("format", format, {"llm2slm-bundle"})
      .optional("schema_version", schema)
      .optional("digest", digest)
      .required("name", out.name)
      .ignored({"sources", "trained", "parity", "tool_versions"}, true)
      .ignored({"engines", "llm_layer", "patches", "weights"}, false)
      .required("shape", out.shape)
      .word("fusion", fusion, {"add", "replace", "prefix", "cross_attention"})
      .required("prompt_template", out.prompt_template)
      .optional("prompt_special_tokens", out.prompt_special_tokens)
      .optional("prompt_strip", out.prompt_strip)
      .optional("prompt_vocab", out.prompt_vocab)
      .positive("max_prompt_tokens", out.max_prompt_tokens)
      .optional("max_total_tokens", out.max_total_tokens)
      .required("tokenizer", out.tokenizer)
      .required("special_ids", out.special_ids)
      .required("generation", out.generation)
      .required("graphs", out.graphs)
      .required("cache", cache)
      .required("files", out.files)
      .optional("head", out.head);
  if (at.empty()) {
    fields.optional("heads", out.heads);
  } else {
    // One level: a head's own manifest has no heads, and files must not be able to nest without end.
    std::map<std::string, std::string> none;
    fields.optional("heads", none);
  }
  fields.done();
  out.state = std::move(cache.state);
  if (out.prompt_vocab.value_or(1) < 1) problems.push_back((at.empty() ? at : at + ".") + "prompt_vocab: must be at least 1");
  if (out.max_total_tokens.value_or(1) < 1) problems.push_back((at.empty() ? at : at + ".") + "max_total_tokens: must be at least 1");
  if (value.is_object()) check_graphs(out, at.empty() ? at : at + ".", problems);
}

std::string written_by(const Json& raw) {
  const auto versions = raw.find("tool_versions");
  if (versions == raw.end() || !versions->is_object()) return "a newer release";
  const auto tool = versions->find("llm2slm-export");
  return tool != versions->end() && tool->is_string() ? "llm2slm-export " + tool->get<std::string>() : "a newer release";
}

// Refuse a manifest of another schema, which may have other fields.
void check_schema(const Json& raw, const std::string& path) {
  const auto found = raw.is_object() ? raw.find("schema_version") : raw.end();
  if (!raw.is_object() || found == raw.end() || !found->is_number_integer()) return;
  const auto schema = found->get<std::int64_t>();
  const std::string fact = path + " has schema version " + std::to_string(schema) + "; this release reads ";
  if (schema < kSchemaVersion) {
    throw failure(ErrorCode::bundle, fact + std::to_string(kSchemaVersion) + ".",
                  {"a manifest of that schema has no digest of itself"}, "build the bundle again");
  }
  if (schema > kSchemaVersion) {
    throw failure(ErrorCode::bundle, fact + "up to " + std::to_string(kSchemaVersion) + ".", {"it was written by " + written_by(raw)},
                  "use a newer release of llm2slm");
  }
}

// Where a manifest's bytes have the digits of its digest; nothing: nowhere.
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
  const auto said = raw.is_object() ? raw.find("digest") : raw.end();
  const std::string_view digits = place ? text.substr(*place, kDigestDigits) : std::string_view();
  if (!place || !raw.is_object() || said == raw.end() || *said != std::string(digits)) {
    throw failure(ErrorCode::bundle, path + " has no digest of itself.",
                  {"expected digest: 64 hexadecimal digits after schema_version"}, kCopyAgain);
  }
  Sha256 digest;
  digest.update(text.substr(0, *place));
  digest.update(std::string(kDigestDigits, '0'));
  digest.update(text.substr(*place + kDigestDigits));
  const std::string got = digest.hex();
  if (got == digits) return;
  throw failure(ErrorCode::bundle, path + " is not what was written.",
                {"expected sha256 " + std::string(digits.substr(0, 16)) + "…, got " + got.substr(0, 16) + "…"}, kCopyAgain);
}

// What to do about a manifest that does not validate.
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
    throw failure(ErrorCode::bundle, path + " is not JSON of a manifest.", {error.what()}, kCopyAgain);
  }
}

Manifest parse_fields(const Json& raw, const std::string& path) {
  Problems problems;
  Manifest manifest;
  parse(raw, "", problems, manifest);
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
    text = File(path).content(kMostJsonBytes);
  } catch (const FileError& unreadable) {
    throw failure(ErrorCode::bundle, path.string() + " cannot be read.", {unreadable.what()}, kCopyAgain);
  }
  return parse_manifest(text, path.string());
}

}  // namespace llm2slm::detail
