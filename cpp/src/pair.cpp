#include <algorithm>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "batching.hpp"
#include "bundle.hpp"
#include "decode_loop.hpp"
#include "encoding_file.hpp"
#include "error.hpp"
#include "generation_options.hpp"
#include "prompt_encoder.hpp"
#include "safetensors_file.hpp"
#include "tokenizer.hpp"

namespace llm2slm {

using namespace detail;

// An opened pair, or one of its heads. Immutable.
class Pair::Impl {
 public:
  Impl(std::filesystem::path directory, std::shared_ptr<const Manifest> bundle, std::shared_ptr<const Ort> ort, Options options,
       std::shared_ptr<const Session> encoder)
      : directory_(std::move(directory)), bundle_(std::move(bundle)), options_(std::move(options)),
        manifest_(select_head(*bundle_, directory_, options_.head)),
        num_tokens_(std::min(manifest_.tokenizer.slm_size, manifest_.shape.vocab_size)),
        llm_tokenizer_(Tokenizer::load(directory_ / manifest_.tokenizer.llm)),
        slm_tokenizer_(manifest_.tokenizer.slm == manifest_.tokenizer.llm
                           ? llm_tokenizer_
                           : Tokenizer::load(directory_ / manifest_.tokenizer.slm)),
        backend_(std::move(ort), directory_, manifest_, options_, std::move(encoder)) {}

  ResolvedOptions resolve(const GenerationOptions& options) const {
    return resolve_options(manifest_.generation, options, num_tokens_);
  }

  std::vector<PromptIds> prompts(const std::vector<std::string>& texts, const PromptOptions& prompt_options,
                                 const ResolvedOptions* options) const {
    std::vector<PromptIds> rows =
        tokenize_prompts(texts, manifest_, *llm_tokenizer_, prompt_options, options ? room(*options) : std::nullopt);
    if (options != nullptr) {
      std::vector<std::size_t> tokens;
      for (const PromptIds& row : rows) tokens.push_back(row.ids.size());
      check_total(tokens, *options);
    }
    return rows;
  }

  // Refuse requests beyond the SLM decoder's last position. The last token is never fed to the decoder; an encoder-decoder SLM's
  // start token takes its place.
  void check_total(const std::vector<std::size_t>& prompt_tokens, const ResolvedOptions& options) const {
    if (!manifest_.max_total_tokens) return;
    const std::int64_t most = *manifest_.max_total_tokens, fresh = options.max_new_tokens;
    const std::string fact = "'" + manifest_.name + "' has " + std::to_string(most) + " positions";
    if (!manifest_.shape.decoder_only()) {
      if (fresh <= most) return;
      throw failure(ErrorCode::usage, fact + ", and max_new_tokens is " + std::to_string(fresh) + ".", {},
                    "lower max_new_tokens to " + std::to_string(most) + " or less");
    }
    std::vector<std::string> problems;
    for (std::size_t i = 0; i < prompt_tokens.size(); ++i) {
      const auto positions = static_cast<std::int64_t>(prompt_tokens[i] * manifest_.shape.context_per_token());
      if (fresh - 1 <= most - positions) continue;
      problems.push_back("prompt " + std::to_string(i) + ": " + std::to_string(positions) + " positions and " +
                         std::to_string(fresh) + " new tokens");
    }
    if (problems.empty()) return;
    throw failure(ErrorCode::prompt,
                  std::to_string(problems.size()) + " of " + std::to_string(prompt_tokens.size()) +
                      " prompts leave too little room: " + fact + ".",
                  listed(problems), "shorten these prompts, set truncate, or lower max_new_tokens");
  }

  std::shared_ptr<const Encoding::Data> encode(const std::vector<PromptIds>& rows, const std::vector<std::size_t>& batch) const {
    std::vector<const PromptIds*> selected;
    for (const std::size_t index : batch) selected.push_back(&rows[index]);
    return encode_batch(backend_, manifest_, selected);
  }

  DecodeLoop decode_loop() const { return {backend_, manifest_, *slm_tokenizer_, static_cast<std::size_t>(num_tokens_)}; }

  std::unique_ptr<Impl> head(const std::string& name) const {
    Options options = options_;
    options.head = name;
    return std::make_unique<Impl>(directory_, bundle_, backend_.ort(), options, backend_.encoder());
  }

  const Manifest& manifest() const { return manifest_; }
  const Manifest& bundle() const { return *bundle_; }
  const std::shared_ptr<const Ort>& ort() const { return backend_.ort(); }

 private:
  // The maximum prompt tokens beside the response, if the SLM's positions hold both; nothing if there is no limit.
  std::optional<std::int64_t> room(const ResolvedOptions& options) const {
    if (!manifest_.max_total_tokens || !manifest_.shape.decoder_only()) return std::nullopt;
    return (*manifest_.max_total_tokens - options.max_new_tokens + 1) /
           static_cast<std::int64_t>(manifest_.shape.context_per_token());
  }

  std::filesystem::path directory_;
  std::shared_ptr<const Manifest> bundle_;
  Options options_;
  Manifest manifest_;
  // Ids that the tokenizer has; a decoder's vocabulary may be padded beyond them.
  std::int64_t num_tokens_;
  std::shared_ptr<const Tokenizer> llm_tokenizer_, slm_tokenizer_;
  OrtBackend backend_;
};

namespace {

void check_stream(const ResolvedOptions& options) {
  std::vector<std::string> reasons;
  if (options.num_beams > 1) {
    reasons.push_back("num_beams is " + std::to_string(options.num_beams) +
                      ": a stream returns tokens once they are certain, and the best beam is known only at the end");
  }
  if (options.num_return_sequences > 1) {
    reasons.push_back("num_return_sequences is " + std::to_string(options.num_return_sequences) + ": a stream has one response");
  }
  if (reasons.empty()) return;
  throw failure(ErrorCode::usage, "This response cannot be streamed.", reasons,
                "use generate, or give num_beams=1 and num_return_sequences=1");
}

std::vector<std::size_t> all_of(std::size_t count) {
  std::vector<std::size_t> indices(count);
  for (std::size_t i = 0; i < count; ++i) indices[i] = i;
  return indices;
}

std::vector<Generation> joined(std::vector<std::vector<Generation>> by_prompt) {
  std::vector<Generation> all;
  for (std::vector<Generation>& generations : by_prompt) {
    for (Generation& generation : generations) all.push_back(std::move(generation));
  }
  return all;
}

// Cores in this process's affinity. More threads than cores would wait for each other.
int available_cores() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

Pair::Pair(const std::filesystem::path& bundle, const Options& options) {
  const int cores = available_cores();
  if (options.threads < 0 || options.threads > cores) {
    throw failure(ErrorCode::usage, "threads is " + std::to_string(options.threads) + ".",
                  {"cores that this process may use: " + std::to_string(cores)},
                  "give 1 to " + std::to_string(cores) + ", or 0 for ONNX Runtime's choice");
  }
  // First, because checking the bundle may hash gigabytes.
  std::shared_ptr<const Ort> ort = Ort::open(options);
  auto manifest = std::make_shared<const Manifest>(open_bundle(bundle));
  impl_ = std::make_unique<Impl>(bundle, std::move(manifest), std::move(ort), options, nullptr);
}

Pair::Pair(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Pair::Pair(Pair&&) noexcept = default;
Pair& Pair::operator=(Pair&&) noexcept = default;
Pair::~Pair() = default;

std::vector<Generation> Pair::generate(const std::vector<std::string>& prompts, const GenerationOptions& options,
                                       const PromptOptions& prompt_options) const {
  const ResolvedOptions resolved = impl_->resolve(options);
  const std::vector<PromptIds> rows = impl_->prompts(prompts, prompt_options, &resolved);
  std::vector<std::size_t> lengths;
  for (const PromptIds& row : rows) lengths.push_back(row.ids.size());
  std::vector<std::vector<Generation>> by_prompt(rows.size());
  std::size_t number = 0;
  for (const std::vector<std::size_t>& batch : batches(lengths, prompt_options.batch_size)) {
    std::vector<std::vector<Generation>> generated =
        impl_->decode_loop().write(*impl_->encode(rows, batch), resolved, batch, number++);
    for (std::size_t i = 0; i < batch.size(); ++i) by_prompt[batch[i]] = std::move(generated[i]);
  }
  return joined(std::move(by_prompt));
}

void Pair::stream(const std::string& prompt, const std::function<bool(const Step&)>& step, const GenerationOptions& options,
                  const PromptOptions& prompt_options) const {
  if (!step) throw failure(ErrorCode::usage, "There is nothing to stream to.", {"step is empty"}, "give a function");
  const ResolvedOptions resolved = impl_->resolve(options);
  check_stream(resolved);
  const std::vector<PromptIds> rows = impl_->prompts({prompt}, prompt_options, &resolved);
  impl_->decode_loop().stream(*impl_->encode(rows, {0}), resolved, step);
}

Encoding Pair::encode(const std::vector<std::string>& prompts, const PromptOptions& prompt_options) const {
  return Encoding(impl_->encode(impl_->prompts(prompts, prompt_options, nullptr), all_of(prompts.size())));
}

std::vector<Generation> Pair::generate_from(const Encoding& encoding, const GenerationOptions& options) const {
  const ResolvedOptions resolved = impl_->resolve(options);
  EncodingIdentity::of(impl_->manifest()).check(encoding.data().identity, "The encoding");
  impl_->check_total(encoding.prompt_tokens(), resolved);
  return joined(impl_->decode_loop().write(encoding.data(), resolved, all_of(encoding.size()), 0));
}

void Pair::save_encoding(const Encoding& encoding, const std::filesystem::path& path) const {
  detail::save_encoding(encoding.data(), path, impl_->manifest());
}

Encoding Pair::load_encoding(const std::filesystem::path& path) const {
  return Encoding(parse_encoding(read_content(path), path.string(), impl_->manifest(), impl_->ort()));
}

Pair Pair::head(const std::string& name) const { return Pair(impl_->head(name)); }

const std::string& Pair::name() const noexcept { return impl_->manifest().name; }
const std::string& Pair::head_name() const noexcept { return impl_->manifest().head; }

std::vector<std::string> Pair::heads() const {
  std::vector<std::string> names{impl_->bundle().head};
  for (const auto& [name, manifest] : impl_->bundle().heads) names.push_back(name);
  return names;
}

std::size_t Pair::max_prompt_tokens() const noexcept {
  return static_cast<std::size_t>(impl_->manifest().max_prompt_tokens);
}

std::string Pair::runtime_version() const { return impl_->ort()->version(); }

const char* version() noexcept { return LLM2SLM_VERSION; }

}  // namespace llm2slm
