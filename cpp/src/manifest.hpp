// A bundle's manifest.json as data. It knows no file but that one.
#ifndef LLM2SLM_MANIFEST_HPP
#define LLM2SLM_MANIFEST_HPP

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "contract.hpp"
#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr std::int64_t kSchemaVersion = 2;

struct GraphEntry {
  std::string file, precision;
  std::vector<std::string> data;
  std::map<std::string, std::string> minimum_runtime;
  std::vector<TensorSpec> inputs, outputs;
};

struct FileEntry {
  std::string path, sha256;
  std::uint64_t bytes = 0;
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

/// transformers' names and meanings; what a caller does not say.
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
  std::string name, head = "main", prompt_template;
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
