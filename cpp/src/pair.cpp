#include <algorithm>
#include <map>
#include <mutex>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "batching.hpp"
#include "bundle.hpp"
#include "decode_loop.hpp"
#include "draft_options.hpp"
#include "encoding_file.hpp"
#include "error.hpp"
#include "generation_options.hpp"
#include "head_drafter.hpp"
#include "ngram_drafter.hpp"
#include "prompt_encoder.hpp"
#include "safetensors_file.hpp"
#include "tokenizer.hpp"
#include "utf8.hpp"

namespace llm2slm {

using namespace detail;

// An opened pair, or one of its heads. Immutable, but for the verifiers that calls open and the costs that they measure.
class Pair::Impl {
 public:
  // Who writes the responses, and how. drafting: nothing if no tokens are drafted.
  struct Plan {
    const Impl* writer;
    ResolvedOptions options;
    std::optional<DraftOptions> drafting;
  };

  Impl(std::filesystem::path directory, std::shared_ptr<const Manifest> bundle, std::shared_ptr<const Ort> ort, Options options,
       std::shared_ptr<const Session> encoder)
      : directory_(std::move(directory)), bundle_(std::move(bundle)), options_(std::move(options)),
        manifest_(select_head(*bundle_, directory_, options_.head)),
        num_tokens_(num_tokens_of(manifest_)),
        llm_tokenizer_(Tokenizer::load(directory_ / manifest_.tokenizer.llm)),
        slm_tokenizer_(manifest_.tokenizer.slm == manifest_.tokenizer.llm
                           ? llm_tokenizer_
                           : Tokenizer::load(directory_ / manifest_.tokenizer.slm)),
        backend_(std::move(ort), directory_, manifest_, options_, std::move(encoder)) {}

  Plan plan(const GenerationOptions& options, const DraftOptions& draft_options) const;

  // plan: nothing if the prompts are only encoded.
  std::vector<PromptIds> prompts(const std::vector<std::string>& texts, const PromptOptions& prompt_options,
                                 const Plan* plan) const {
    std::vector<std::pair<const Impl*, ResolvedOptions>> checks;
    if (plan != nullptr) checks.emplace_back(plan->writer, plan->options);
    if (plan != nullptr && plan->writer != this) {
      // A draft may be shorter than the response.
      checks.emplace_back(this, plan->options);
      checks.back().second.max_new_tokens = 1;
    }
    std::optional<std::int64_t> least;
    for (const auto& [pair, options] : checks) {
      if (const auto room = pair->room(options)) least = std::min(least.value_or(*room), *room);
    }
    std::vector<PromptIds> rows = tokenize_prompts(texts, manifest_, *llm_tokenizer_, prompt_options, least);
    std::vector<std::size_t> tokens;
    for (const PromptIds& row : rows) tokens.push_back(row.ids.size());
    for (const auto& [pair, options] : checks) pair->check_total(tokens, options);
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
    return encoding_of(read(rows, batch), backend_, manifest_);
  }

  // The encoding for the head that writes, and how its rows are drafted. Prompts are encoded once for both heads.
  std::pair<std::shared_ptr<const Encoding::Data>, std::optional<Drafting>> prepare(const std::vector<PromptIds>& rows,
                                                                                    const std::vector<std::size_t>& batch,
                                                                                    const Plan& plan) const {
    if (plan.writer == this) return {encode(rows, batch), lookup(plan)};
    const ReadPrompts prompts = plan.writer->read(rows, batch);
    return {encoding_of(prompts, plan.writer->backend_, plan.writer->manifest_), own_drafts(plan, prompts)};
  }

  // Drafting by prompt lookup, if the plan says so.
  std::optional<Drafting> lookup(const Plan& plan) const {
    if (!plan.drafting) return std::nullopt;
    return Drafting(*plan.drafting, lookup_costs_, [this](const Request& request, std::size_t row, double) {
      return std::make_unique<NgramDrafter>(prompt_ids(request, row));
    });
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
  // A head that verifies this pair's drafts, and what its calls cost.
  struct Verifier;

  ReadPrompts read(const std::vector<PromptIds>& rows, const std::vector<std::size_t>& batch) const {
    std::vector<const PromptIds*> selected;
    for (const std::size_t index : batch) selected.push_back(&rows[index]);
    return read_batch(backend_, manifest_, selected);
  }

  std::string head_names() const {
    std::string names = bundle_->head;
    for (const auto& [name, manifest] : bundle_->heads) names += ", " + name;
    return names;
  }

  Verifier& verifier(const std::string& name) const;
  Drafting own_drafts(const Plan& plan, const ReadPrompts& prompts) const;

  static std::int64_t num_tokens_of(const Manifest& manifest) {
    return std::min(manifest.tokenizer.slm_size, manifest.shape.vocab_size);
  }

  // Whether a head's responses are tokenized as this pair's. A bundle's equal tokenizers may be different files.
  bool same_tokenizer(const Manifest& head) const {
    const auto hash = [this](const std::string& path) {
      const auto named = [&path](const FileEntry& file) { return file.path == path; };
      return std::find_if(bundle_->files.begin(), bundle_->files.end(), named)->sha256;
    };
    const std::string &own = manifest_.tokenizer.slm, &others = head.tokenizer.slm;
    return num_tokens_ == num_tokens_of(head) && (own == others || hash(own) == hash(others));
  }

  // A prompt's ids in the SLM's tokenizer.
  Ids prompt_ids(const Request& request, std::size_t row) const {
    const Encoding::Data& encoding = request.encoding;
    const std::int64_t* first =
        encoding.input_ids->id_data() + row * static_cast<std::size_t>(encoding.input_ids->shape()[1]);
    const Ids ids(first, first + encoding.conditioning.prompt_tokens[row]);
    if (llm_tokenizer_ == slm_tokenizer_) return ids;
    return slm_tokenizer_->encode(llm_tokenizer_->decode(ids), {false, false}).ids;
  }

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
  mutable CallCosts lookup_costs_{0.0};
  mutable std::mutex opening_;
  mutable std::map<std::string, std::unique_ptr<Verifier>> verifiers_;
};

struct Pair::Impl::Verifier {
  Verifier(const Impl& drafts, Options options)
      : pair(drafts.directory_, drafts.bundle_, drafts.backend_.ort(), std::move(options), drafts.backend_.encoder()) {}
  Impl pair;
  CallCosts costs;
};

Pair::Impl::Verifier& Pair::Impl::verifier(const std::string& name) const {
  if (name == manifest_.head) {
    throw failure(ErrorCode::usage, "The head " + python_repr(name) + " cannot verify its own drafts.", {"heads: " + head_names()},
                  "give another head as the verifier, or leave it out");
  }
  const std::lock_guard<std::mutex> lock(opening_);
  if (const auto found = verifiers_.find(name); found != verifiers_.end()) return *found->second;
  const Manifest selected = select_head(*bundle_, directory_, name);
  if (!same_tokenizer(selected)) {
    const auto described = [](const Manifest& head) {
      return head.head + ": " + head.tokenizer.slm + ", " + std::to_string(num_tokens_of(head)) + " tokens";
    };
    throw failure(ErrorCode::usage,
                  "The head " + python_repr(name) + " cannot verify the drafts of " + python_repr(manifest_.head) +
                      ": their tokenizers differ.",
                  {described(manifest_), described(selected)}, "leave out the verifier: only heads with the same tokenizer can verify");
  }
  Options options = options_;
  options.head = name;
  return *verifiers_.emplace(name, std::make_unique<Verifier>(*this, std::move(options))).first->second;
}

Pair::Impl::Plan Pair::Impl::plan(const GenerationOptions& options, const DraftOptions& draft_options) const {
  check_draft_options(draft_options);
  const Impl* writer = draft_options.verifier ? &verifier(*draft_options.verifier).pair : this;
  Plan made{writer, resolve_options(writer->manifest_.generation, options, writer->num_tokens_), std::nullopt};
  check_drafted(draft_options, made.options);
  if (!is_given(draft_options)) return made;
  made.drafting = draft_options;
  // The drafter and the verifier draw with the same seed.
  if (made.options.do_sample && !made.options.seed) made.options.seed = fresh_entropy();
  return made;
}

// Drafting by this pair for its verifier.
Drafting Pair::Impl::own_drafts(const Plan& plan, const ReadPrompts& prompts) const {
  CallCosts& costs = verifier(*plan.drafting->verifier).costs;
  // Made at the first draft: where drafts do not pay, this pair's projector does not run.
  const auto own = std::make_shared<std::shared_ptr<const Encoding::Data>>();
  return Drafting(*plan.drafting, costs, [=, &costs](const Request& request, std::size_t row, double least_confidence) {
    if (*own == nullptr) *own = encoding_of(prompts, backend_, manifest_);
    const Encoding::Data& encoding = **own;
    return std::make_unique<HeadDrafter>(decode_loop().request(encoding, request.options, request.prompts), row,
                                         backend_.decoder(manifest_, encoding.conditioning.of(row, ort())), costs,
                                         least_confidence);
  });
}

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
                                       const PromptOptions& prompt_options, const DraftOptions& draft_options) const {
  const Impl::Plan plan = impl_->plan(options, draft_options);
  const std::vector<PromptIds> rows = impl_->prompts(prompts, prompt_options, &plan);
  const std::size_t size = prompt_options.batch_size == 0 && plan.drafting ? 1 : prompt_options.batch_size;
  std::vector<std::size_t> lengths;
  for (const PromptIds& row : rows) lengths.push_back(row.ids.size());
  std::vector<std::vector<Generation>> by_prompt(rows.size());
  std::size_t number = 0;
  for (const std::vector<std::size_t>& batch : batches(lengths, size)) {
    const auto [encoding, drafting] = impl_->prepare(rows, batch, plan);
    std::vector<std::vector<Generation>> generated =
        plan.writer->decode_loop().write(*encoding, plan.options, batch, number++, drafting ? &*drafting : nullptr);
    for (std::size_t i = 0; i < batch.size(); ++i) by_prompt[batch[i]] = std::move(generated[i]);
  }
  return joined(std::move(by_prompt));
}

void Pair::stream(const std::string& prompt, const std::function<bool(const Step&)>& step, const GenerationOptions& options,
                  const PromptOptions& prompt_options, const DraftOptions& draft_options) const {
  if (!step) throw failure(ErrorCode::usage, "There is nothing to stream to.", {"step is empty"}, "give a function");
  const Impl::Plan plan = impl_->plan(options, draft_options);
  check_stream(plan.options);
  const std::vector<PromptIds> rows = impl_->prompts({prompt}, prompt_options, &plan);
  const auto [encoding, drafting] = impl_->prepare(rows, {0}, plan);
  plan.writer->decode_loop().stream(*encoding, plan.options, step, drafting ? &*drafting : nullptr);
}

Encoding Pair::encode(const std::vector<std::string>& prompts, const PromptOptions& prompt_options) const {
  return Encoding(impl_->encode(impl_->prompts(prompts, prompt_options, nullptr), all_of(prompts.size())));
}

std::vector<Generation> Pair::generate_from(const Encoding& encoding, const GenerationOptions& options,
                                            const DraftOptions& draft_options) const {
  const Impl::Plan plan = impl_->plan(options, draft_options);
  if (draft_options.verifier) {
    throw failure(ErrorCode::usage,
                  "An encoding of the head " + python_repr(head_name()) + " cannot be verified by the head " +
                      python_repr(*draft_options.verifier) + ": it does not have that head's conditioning.",
                  {}, "use generate or stream with the verifier, or encode and generate with that head alone");
  }
  EncodingIdentity::of(impl_->manifest()).check(encoding.data().identity, "The encoding");
  impl_->check_total(encoding.prompt_tokens(), plan.options);
  const std::optional<Drafting> drafting = impl_->lookup(plan);
  return joined(impl_->decode_loop().write(encoding.data(), plan.options, all_of(encoding.size()), 0, drafting ? &*drafting : nullptr));
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
