// llm2slm: an exported LLM-to-SLM pair in C++17. A complete program:
//
//     #include <iostream>
//     #include <llm2slm/llm2slm.hpp>
//
//     int main(int argc, char** argv) try {
//       llm2slm::Pair pair(argv[1]);  // a directory that `llm2slm-export build` wrote
//       for (const llm2slm::Generation& response : pair.generate({argv[2]})) std::cout << response.text << '\n';
//     } catch (const std::exception& error) {
//       std::cerr << error.what() << '\n';
//       return EXIT_FAILURE;
//     }
//
//     c++ -std=c++17 program.cpp $(pkg-config --cflags --libs llm2slm) -o program
//     LLM2SLM_ORT_LIBRARY=/path/to/libonnxruntime.so.1 ./program engines/demo "How are you?"
//
// A prompt is read once, by the LLM; the SLM then writes the response token by token. ONNX Runtime is the program's own,
// found when a Pair is opened. The library prints nothing, ends no process, keeps no global state and opens no
// connection; ONNX Runtime's own builds since 1.29 send telemetry, which opening a Pair turns off as far as its API
// can: ORT_DISABLE_TELEMETRY=1 in the environment keeps it from starting at all. Text is UTF-8 everywhere.
#ifndef LLM2SLM_LLM2SLM_HPP
#define LLM2SLM_LLM2SLM_HPP

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "llm2slm/visibility.h"

struct OrtApiBase;

namespace llm2slm {

/// What kind of failure an Error is; the values are those of `llm2slm_status` in llm2slm.h.
enum class ErrorCode {
  ok = 0,         ///< none: no Error has it
  usage,          ///< an invalid call or option
  bundle,         ///< a bundle that is missing, altered, of a newer release, or whose decoder gives no finite logits
  prompt,         ///< a prompt that cannot be run: empty, too long, not UTF-8
  encoding,       ///< a file of an encoding, or one that another pair made
  runtime,        ///< ONNX Runtime: not found, too old, or failing
  out_of_memory,  ///< memory ran out
  internal,       ///< a mistake of this library; please report it
};

/// A failure. what() says the fact in the first line, then the evidence, one `  - ` line each, then `  → ` what to do next.
class LLM2SLM_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message);
  ~Error() override;
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// Which graphs a Pair loads. One machine can encode prompts and another generate the responses.
enum class Part {
  pair,    ///< all graphs
  reader,  ///< encoder and projector: encodes prompts
  writer,  ///< decoder: generates responses to encodings
};

/// Options of a Pair.
struct Options {
  /// Threads inside one operator, of each graph; 0 leaves the choice to ONNX Runtime, which takes one per core. More
  /// than the process has cores (its affinity) are refused.
  int threads = 0;
  /// The bundle's head to open; empty: its first.
  std::string head;
  Part part = Part::pair;
  /// Path of ONNX Runtime's shared library. Where it is empty: the environment variable LLM2SLM_ORT_LIBRARY, then an ONNX
  /// Runtime that the process has loaded already, then libonnxruntime.so.1 where the system finds libraries.
  std::string ort_library;
  /// The program's own ONNX Runtime, from `OrtGetApiBase()`. If set, none is searched for.
  const OrtApiBase* ort_api_base = nullptr;
};

/// When beam search stops: `yes` at the first num_beams finished responses, `no` by a heuristic, `never` before nothing better can
/// come. transformers' False, True and "never".
enum class EarlyStopping { no, yes, never };

/// Generation options: the names and meanings of transformers' `generate`. Unset options take the bundle's defaults.
struct GenerationOptions {
  std::optional<std::int64_t> max_new_tokens;
  std::optional<std::int64_t> min_new_tokens;
  std::optional<bool> do_sample;
  std::optional<std::int64_t> num_beams;
  std::optional<std::int64_t> num_return_sequences;
  /// Beams only, from -8 to 8.
  std::optional<double> length_penalty;
  /// Beams only.
  std::optional<EarlyStopping> early_stopping;
  std::optional<double> temperature;
  std::optional<std::int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> min_p;
  std::optional<double> typical_p;
  std::optional<double> repetition_penalty;
  std::optional<std::int64_t> no_repeat_ngram_size;
  /// Sequences of token ids that are never completed.
  std::optional<std::vector<std::vector<std::int64_t>>> bad_words_ids;
  /// The token that follows the decoder start token.
  std::optional<std::int64_t> forced_bos_token_id;
  /// The last token of a response that reaches max_new_tokens.
  std::optional<std::int64_t> forced_eos_token_id;
  /// Makes sampling repeatable: the draws are those of the Python package with the same seed.
  std::optional<std::uint64_t> seed;
  /// Strings that end a response; the text is cut before the first of them.
  std::vector<std::string> stop;
  /// Also give the log-probability of every token.
  bool output_scores = false;
};

/// What drafts besides the pair: `ngram` is prompt lookup, which proposes what followed the same last tokens earlier, in the
/// prompt or in the response.
enum class DrafterName { ngram };

/// Options of drafting: several tokens are proposed at once, and one decoder call accepts or corrects them. Names and rules are
/// those of the Python package (docs/pairs.md). Nothing is drafted unless `drafter` or `verifier` is set.
struct DraftOptions {
  std::optional<DrafterName> drafter;
  /// The head that accepts or corrects what the pair drafts. The response and the default options are that head's. It is opened by
  /// the first call that names it, and stays open as long as the pair.
  std::optional<std::string> verifier;
  /// With a verifier: it decides only tokens to which the drafting pair's model, before temperature, top-k and the like, gives a
  /// lower probability. 1: all tokens; 0: none.
  std::optional<double> defer;
  /// Tokens per draft, 1 to 64; if not set, adapted to the share of accepted tokens and to the measured times of calls.
  std::optional<std::int64_t> num_draft_tokens;
};

/// Options for prompts.
struct PromptOptions {
  /// Cut prompts that are too long instead of refusing them.
  bool truncate = false;
  /// Maximum prompts per batch; 0: all prompts of similar length, and one with drafting.
  std::size_t batch_size = 0;
  /// Tokenize text that spells a special token as ordinary text, as in transformers. Refused if the bundle's prompt template holds
  /// special tokens.
  bool split_special_tokens = false;
};

/// Why a response ended: `stop` (end-of-sequence token or stop string) or `length` (max_new_tokens).
enum class FinishReason { stop, length };

/// Milliseconds of each stage, for the batch that a prompt was in. `prefill` is the first decoder call, `decode` all later
/// ones. An encoding's share is counted at every use.
struct Timings {
  double tokenize = 0, encode = 0, project = 0, prefill = 0, decode = 0;
  double total() const noexcept { return tokenize + encode + project + prefill + decode; }
};

/// A response.
struct Generation {
  std::string text;
  /// The generated tokens, without the decoder start token, with the end-of-sequence token if there is one.
  std::vector<std::int64_t> token_ids;
  FinishReason finish_reason = FinishReason::length;
  /// Tokens the LLM read, and tokens cut from an over-long prompt.
  std::size_t prompt_tokens = 0, dropped_tokens = 0;
  Timings timings_ms;
  /// Number of the batch among those of the call: responses with the same number share their times.
  std::size_t batch = 0;
  /// Index among the responses to the same prompt.
  std::size_t sequence = 0;
  /// Beam search: transformers' `sequences_scores`.
  std::optional<double> score;
  /// One per token with `output_scores`, else empty.
  std::vector<float> token_logprobs;
  /// Draft tokens that the decoder verified, and those that it accepted; not set if nothing was drafted.
  std::optional<std::size_t> drafted_tokens, accepted_tokens;
};

/// One token of a response.
struct Step {
  std::int64_t token_id = 0;
  /// The text that this token makes certain: may be empty, or include text that was held back.
  std::string text;
  /// Set on the last step only.
  std::optional<FinishReason> finish_reason;
  std::optional<float> logprob;
  /// The whole response, on the last step; valid during the callback.
  const Generation* generation = nullptr;
};

/// The output of encoder and projector for a batch of prompts: immutable, reusable, shareable between threads. Copies share memory.
class LLM2SLM_API Encoding {
 public:
  struct Data;
  explicit Encoding(std::shared_ptr<const Data> data);
  Encoding(const Encoding&);
  Encoding(Encoding&&) noexcept;
  Encoding& operator=(const Encoding&);
  Encoding& operator=(Encoding&&) noexcept;
  ~Encoding();

  /// Number of prompts.
  std::size_t size() const noexcept;
  /// [size()] tokens the LLM read, and tokens cut from over-long prompts.
  const std::vector<std::size_t>& prompt_tokens() const noexcept;
  const std::vector<std::size_t>& dropped_tokens() const noexcept;
  /// Times of the batch: `tokenize`, `encode`, `project`; zeros if it was read from a file.
  const Timings& timings_ms() const noexcept;
  const Data& data() const noexcept { return *data_; }

 private:
  std::shared_ptr<const Data> data_;
};

/// An opened pair. Several threads may call all methods but assignment and destruction at once: they share the graphs, and each call
/// has its own decoder state. Every method throws Error, or std::bad_alloc if memory runs out.
class LLM2SLM_API Pair {
 public:
  /// Open a bundle: check its manifest and the size and sha256 of every file, find ONNX Runtime, load the graphs.
  ///
  /// Throws Error: `bundle` (no bundle, a newer schema, fields that do not validate, files missing or altered, each named),
  /// `runtime` (ONNX Runtime not found, or older than the library or the bundle needs), `usage` (an unknown head or an
  /// invalid number of threads).
  explicit Pair(const std::filesystem::path& bundle, const Options& options = {});
  Pair(Pair&&) noexcept;
  Pair& operator=(Pair&&) noexcept;
  ~Pair();

  /// The responses to prompts, in their order; `num_return_sequences` of each, one after another. Prompts of similar length
  /// run together.
  ///
  /// With drafting, prompts run one by one unless batch_size is set. A batch of three or more is not drafted, except with `defer`
  /// and for sampling with a verifier, where the response depends on the drafts.
  ///
  /// Throws Error: `usage` (options that mean nothing, all named; a verifier that is the pair's own head or has another tokenizer),
  /// `prompt` (prompts that are empty, too long or not UTF-8, or hold a token that the pair has no row for: the first ones are named,
  /// all are counted, and nothing is generated), `bundle` (the decoder's logits are not finite).
  std::vector<Generation> generate(const std::vector<std::string>& prompts, const GenerationOptions& options = {},
                                   const PromptOptions& prompt_options = {}, const DraftOptions& draft_options = {}) const;

  /// The response to one prompt, token by token, until it ends or `step` returns false. The texts of the steps join to
  /// `Generation::text`. Exceptions of `step` are passed on.
  ///
  /// Throws Error: as generate; `usage` for beams or several sequences, which cannot be streamed.
  void stream(const std::string& prompt, const std::function<bool(const Step&)>& step,
              const GenerationOptions& options = {}, const PromptOptions& prompt_options = {},
              const DraftOptions& draft_options = {}) const;

  /// Run the encoder and the projector on prompts, in one batch.
  Encoding encode(const std::vector<std::string>& prompts, const PromptOptions& prompt_options = {}) const;

  /// The responses to encoded prompts. The encoding may come from another Pair of the same bundle.
  ///
  /// Throws Error: `encoding` where another pair made the encoding; `usage`, `prompt` and `bundle` as generate; `usage` with a verifier,
  /// whose conditioning is not in the encoding.
  std::vector<Generation> generate_from(const Encoding& encoding, const GenerationOptions& options = {},
                                        const DraftOptions& draft_options = {}) const;

  /// Write an encoding to a safetensors file, the same that Python's `save_encoding` writes, for this pair in any process and
  /// on any machine. It appears whole or not at all, and only its owner can read it.
  void save_encoding(const Encoding& encoding, const std::filesystem::path& path) const;

  /// Read an encoding that `save_encoding` wrote, here or in Python.
  ///
  /// Throws Error: `encoding` (no such file, damaged, not an encoding, or made by another pair).
  Encoding load_encoding(const std::filesystem::path& path) const;

  /// The pair of another head of the bundle; both share the encoder. It may outlive this one.
  Pair head(const std::string& name) const;

  /// The name of the pair, the head that is open, and all heads of the bundle.
  const std::string& name() const noexcept;
  const std::string& head_name() const noexcept;
  std::vector<std::string> heads() const;
  /// Most tokens of a prompt.
  std::size_t max_prompt_tokens() const noexcept;
  /// The version of the ONNX Runtime in use, such as "1.25.0".
  std::string runtime_version() const;

 private:
  class Impl;
  explicit Pair(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// The version of this library, such as "0.1.0".
LLM2SLM_API const char* version() noexcept;

}  // namespace llm2slm

#endif
