// A bundle's manifest.json as data. Other files are not known here.
#ifndef LLM2SLM_MANIFEST_HPP
#define LLM2SLM_MANIFEST_HPP

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "contract.hpp"
#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr std::int64_t kSchemaVersion = 4;

// Upper bounds of any manifest's values, beyond which memory would run out.
inline constexpr std::int64_t kMostNewTokens = 1'000'000;
inline constexpr std::int64_t kMostRows = 1'024;  // beams, or responses, to a prompt

struct GraphEntry {
  std::string file, precision;
  std::vector<std::string> data;
  std::map<std::string, std::string> minimum_runtime;
  std::vector<TensorSpec> inputs, outputs;
  std::optional<std::int64_t> block_size, bytes_read;
  bool quantize_lm_head = false;
  std::int64_t opset = 0;

  friend bool operator==(const GraphEntry& a, const GraphEntry& b) {
    const auto fields = [](const GraphEntry& e) {
      return std::tie(e.file, e.precision, e.data, e.minimum_runtime, e.inputs, e.outputs, e.block_size, e.bytes_read, e.quantize_lm_head,
                      e.opset);
    };
    return fields(a) == fields(b);
  }
};

struct FileEntry {
  std::string path, sha256;
  std::int64_t bytes = 0;
};

/// Of one input in one of an engine's profiles.
struct Bounds {
  std::vector<std::int64_t> minimum, optimum, maximum;
};

/// A graph compiled for a device. This library runs none, but validates the entry.
struct EngineEntry {
  std::string file;
  std::vector<TensorSpec> inputs;
  std::vector<std::map<std::string, Bounds>> profiles;
};

struct EngineSet {
  std::map<std::string, EngineEntry> graphs;
};

/// `slm_size`: ids that the SLM's tokenizer can produce; logits at and beyond it belong to no token.
struct TokenizerEntry {
  std::string strategy, llm, slm;
  std::int64_t slm_size = 0;
};

/// `prompt_pad` fills LLM prompts, `pad` finished rows; `decoder_start` is absent for decoder-only SLMs.
struct SpecialIds {
  std::int64_t prompt_pad = 0, pad = 0;
  std::vector<std::int64_t> eos;
  std::optional<std::int64_t> decoder_start;
};

/// Defaults of the generation options: transformers' names and meanings.
struct GenerationDefaults {
  std::int64_t max_new_tokens = 0, min_new_tokens = 0;
  bool do_sample = false;
  std::int64_t num_beams = 1, num_return_sequences = 1;
  double length_penalty = 1.0;
  EarlyStopping early_stopping = EarlyStopping::no;
  double temperature = 1.0;
  std::int64_t top_k = 50;
  double top_p = 1.0, min_p = 0.0, typical_p = 1.0, repetition_penalty = 1.0;
  std::int64_t no_repeat_ngram_size = 0;
  std::vector<std::vector<std::int64_t>> bad_words_ids;
  std::optional<std::int64_t> forced_bos_token_id, forced_eos_token_id;
};

/// A pair. With several heads over one encoder it is the first head's, and `heads` holds the manifests of the others.
struct Manifest {
  std::string name, head = "main", prompt_template, fusion, digest;
  std::vector<std::string> sources;  // the models that are named
  // Whether the tokenizer adds its special tokens to the filled template, and whether the prompt loses the whitespace around it.
  bool prompt_special_tokens = true, prompt_strip = false;
  // Rows of the tables that a prompt's ids are looked up in.
  std::optional<std::int64_t> prompt_vocab;
  PairShape shape;
  std::int64_t max_prompt_tokens = 0;
  std::optional<std::int64_t> max_total_tokens;
  TokenizerEntry tokenizer;
  SpecialIds special_ids;
  GenerationDefaults generation;
  std::map<std::string, GraphEntry> graphs;
  std::vector<StateSpec> state;
  std::vector<FileEntry> files;
  std::map<std::string, EngineSet> engines;
  std::map<std::string, Manifest> heads;

  const GraphEntry& graph(const std::string& graph_name) const { return graphs.at(graph_name); }
};

/// The manifest in a text. `path` is what messages call it.
///
/// Throws Error(bundle): not JSON, another schema, altered after it was written (`digest`), or fields that do not validate, all of
/// them named.
Manifest parse_manifest(std::string_view text, const std::string& path);

/// The same but for the digest, which need not be right.
Manifest parse_undigested(std::string_view text, const std::string& path);

/// The manifest of a bundle; no other file is looked at. Throws as parse_manifest, and where there is none.
Manifest read_manifest(const std::filesystem::path& directory);

}  // namespace llm2slm::detail

#endif
