#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.hpp"
#include "llm2slm/llm2slm.h"
#include "llm2slm/llm2slm.hpp"

struct llm2slm_error {
  llm2slm_status status;
  std::string message;
};

struct llm2slm_pair_options {
  llm2slm::Options options;
};

struct llm2slm_generation_options {
  llm2slm::GenerationOptions options;
  llm2slm::PromptOptions prompt_options;
  llm2slm::DraftOptions draft_options;
};

struct llm2slm_pair {
  explicit llm2slm_pair(llm2slm::Pair opened)
      : pair(std::move(opened)), heads(pair.heads()), runtime_version(pair.runtime_version()) {}
  llm2slm::Pair pair;
  // Copies: returned pointers stay valid as long as the pair.
  std::vector<std::string> heads;
  std::string runtime_version;
};

struct llm2slm_encoding {
  llm2slm::Encoding encoding;
};

struct llm2slm_generations {
  std::vector<llm2slm::Generation> all;
};

namespace {

using llm2slm::ErrorCode;
using llm2slm::detail::failure;

llm2slm_status put(llm2slm_error** error, llm2slm_status status, const char* message) noexcept {
  if (error == nullptr) return status;
  *error = new (std::nothrow) llm2slm_error{status, {}};
  if (*error == nullptr) return status;
  try {
    // An Error's message is printable; an exception of anything else may say what is no UTF-8.
    (*error)->message = status == LLM2SLM_INTERNAL ? llm2slm::detail::printable(message) : message;
  } catch (const std::bad_alloc&) {
    // A short one needs no memory.
    (*error)->message = "no memory";
  }
  return status;
}

// Run what may throw: nothing that it throws goes further.
template <typename Work>
llm2slm_status guarded(llm2slm_error** error, Work&& work) noexcept {
  if (error != nullptr) *error = nullptr;
  try {
    work();
    return LLM2SLM_OK;
  } catch (const llm2slm::Error& failed) {
    return put(error, static_cast<llm2slm_status>(failed.code()), failed.what());
  } catch (const std::bad_alloc&) {
    return put(error, LLM2SLM_OUT_OF_MEMORY, "Memory ran out.\n  → run fewer or shorter prompts at once");
  } catch (const std::length_error&) {
    return put(error, LLM2SLM_OUT_OF_MEMORY, "More was asked for than any memory holds.\n  → lower num_beams or num_return_sequences");
  } catch (const std::exception& failed) {
    return put(error, LLM2SLM_INTERNAL, failed.what());
  } catch (...) {
    return put(error, LLM2SLM_INTERNAL, "An object that is not an exception was thrown. Please report it.");
  }
}

template <typename T>
void need(const T* pointer, const char* name) {
  if (pointer == nullptr) {
    throw failure(ErrorCode::usage, std::string(name) + " is NULL.", {}, "give what an earlier call made");
  }
}

// Set a result to nothing before anything can fail.
template <typename T>
void need_place(T** place, const char* name) {
  need(place, name);
  *place = nullptr;
}

std::vector<std::string> texts(const char* const* prompts, const std::size_t* lengths, std::size_t count) {
  if (count > 0) need(prompts, "prompts");
  std::vector<std::string> all;
  for (std::size_t i = 0; i < count; ++i) {
    need(prompts[i], "a prompt");
    if (lengths == nullptr) {
      all.emplace_back(prompts[i]);
    } else {
      all.emplace_back(prompts[i], lengths[i]);
    }
  }
  return all;
}

llm2slm::Error unknown(const char* name, const std::string& known) {
  return failure(ErrorCode::usage, std::string("There is no option '") + name + "' of that type.", {"there are: " + known},
                 "choose one of these");
}

const llm2slm::Generation* find(const llm2slm_generations* responses, std::size_t index) {
  return responses == nullptr || index >= responses->all.size() ? nullptr : &responses->all[index];
}

llm2slm_finish_reason reason_of(llm2slm::FinishReason reason) {
  return reason == llm2slm::FinishReason::stop ? LLM2SLM_STOP : LLM2SLM_LENGTH;
}

const llm2slm::GenerationOptions& options_of(const llm2slm_generation_options* options,
                                             const llm2slm::GenerationOptions& none) {
  return options == nullptr ? none : options->options;
}

llm2slm::PromptOptions prompt_options_of(const llm2slm_generation_options* options) {
  return options == nullptr ? llm2slm::PromptOptions{} : options->prompt_options;
}

llm2slm::DraftOptions draft_options_of(const llm2slm_generation_options* options) {
  return options == nullptr ? llm2slm::DraftOptions{} : options->draft_options;
}

bool flag(const char* name, std::int64_t value) {
  if (value == 0 || value == 1) return value == 1;
  throw failure(ErrorCode::usage, std::string(name) + ": must be 0 or 1, got " + std::to_string(value), {}, "give one of these");
}

std::uint64_t natural(const char* name, std::int64_t value) {
  if (value >= 0) return static_cast<std::uint64_t>(value);
  throw failure(ErrorCode::usage, std::string(name) + ": must be at least 0, got " + std::to_string(value), {}, "give a whole number");
}

void set_int(llm2slm_generation_options& into, const char* name, std::int64_t value) {
  llm2slm::GenerationOptions& o = into.options;
  const std::map<std::string, std::optional<std::int64_t>*> numbers{
      {"max_new_tokens", &o.max_new_tokens},           {"min_new_tokens", &o.min_new_tokens},
      {"num_beams", &o.num_beams},                     {"num_return_sequences", &o.num_return_sequences},
      {"top_k", &o.top_k},                             {"no_repeat_ngram_size", &o.no_repeat_ngram_size},
      {"forced_bos_token_id", &o.forced_bos_token_id}, {"forced_eos_token_id", &o.forced_eos_token_id},
      {"num_draft_tokens", &into.draft_options.num_draft_tokens}};
  const std::string given = name;
  if (const auto found = numbers.find(given); found != numbers.end()) {
    *found->second = value;
  } else if (given == "do_sample") {
    o.do_sample = flag(name, value);
  } else if (given == "early_stopping") {
    o.early_stopping = flag(name, value) ? llm2slm::EarlyStopping::yes : llm2slm::EarlyStopping::no;
  } else if (given == "seed") {
    o.seed = natural(name, value);
  } else if (given == "output_scores") {
    o.output_scores = flag(name, value);
  } else if (given == "truncate") {
    into.prompt_options.truncate = flag(name, value);
  } else if (given == "split_special_tokens") {
    into.prompt_options.split_special_tokens = flag(name, value);
  } else if (given == "batch_size") {
    into.prompt_options.batch_size = natural(name, value);
  } else {
    std::string known = "do_sample, early_stopping, seed, output_scores, truncate, batch_size, split_special_tokens";
    for (const auto& [each, place] : numbers) known += ", " + each;
    throw unknown(name, known);
  }
}

void set_number(llm2slm_generation_options& into, const char* name, double value) {
  llm2slm::GenerationOptions& o = into.options;
  const std::map<std::string, std::optional<double>*> numbers{
      {"length_penalty", &o.length_penalty}, {"temperature", &o.temperature}, {"top_p", &o.top_p},
      {"min_p", &o.min_p},                   {"typical_p", &o.typical_p},     {"repetition_penalty", &o.repetition_penalty},
      {"defer", &into.draft_options.defer}};
  const auto found = numbers.find(name);
  if (found == numbers.end()) {
    std::string known;
    for (const auto& [each, place] : numbers) known += (known.empty() ? "" : ", ") + each;
    throw unknown(name, known);
  }
  *found->second = value;
}

}  // namespace

const char* llm2slm_version(void) { return llm2slm::version(); }
int32_t llm2slm_abi_version(void) { return LLM2SLM_ABI_VERSION; }

llm2slm_status llm2slm_error_status(const llm2slm_error* error) { return error == nullptr ? LLM2SLM_OK : error->status; }
const char* llm2slm_error_message(const llm2slm_error* error) {
  return error == nullptr ? "There is no error here." : error->message.c_str();
}
void llm2slm_error_free(llm2slm_error* error) { delete error; }

llm2slm_status llm2slm_pair_options_new(llm2slm_pair_options** options, llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(options, "options");
    *options = new llm2slm_pair_options;
  });
}

llm2slm_status llm2slm_pair_options_set_int(llm2slm_pair_options* options, const char* name, int64_t value,
                                            llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    need(name, "name");
    if (std::strcmp(name, "threads") != 0) throw unknown(name, "threads");
    const bool small = value >= 0 && value <= std::numeric_limits<int>::max();
    options->options.threads = small ? static_cast<int>(value) : -1;
  });
}

llm2slm_status llm2slm_pair_options_set_string(llm2slm_pair_options* options, const char* name, const char* value,
                                               llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    need(name, "name");
    need(value, "value");
    const std::string given = name, text = value;
    if (given == "head") {
      options->options.head = text;
    } else if (given == "ort_library") {
      options->options.ort_library = text;
    } else if (given == "part" && (text == "pair" || text == "reader" || text == "writer")) {
      options->options.part = text == "pair"     ? llm2slm::Part::pair
                              : text == "reader" ? llm2slm::Part::reader
                                                 : llm2slm::Part::writer;
    } else if (given == "part") {
      throw failure(ErrorCode::usage, "part: must be pair, reader or writer, got '" + text + "'", {}, "choose one of these");
    } else {
      throw unknown(name, "head, part, ort_library");
    }
  });
}

llm2slm_status llm2slm_pair_options_set_ort_api_base(llm2slm_pair_options* options, const void* base,
                                                     llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    options->options.ort_api_base = static_cast<const OrtApiBase*>(base);
  });
}

void llm2slm_pair_options_free(llm2slm_pair_options* options) { delete options; }

llm2slm_status llm2slm_generation_options_new(llm2slm_generation_options** options, llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(options, "options");
    *options = new llm2slm_generation_options;
  });
}

llm2slm_status llm2slm_generation_options_set_int(llm2slm_generation_options* options, const char* name, int64_t value,
                                                  llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    need(name, "name");
    set_int(*options, name, value);
  });
}

llm2slm_status llm2slm_generation_options_set_number(llm2slm_generation_options* options, const char* name, double value,
                                                     llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    need(name, "name");
    set_number(*options, name, value);
  });
}

llm2slm_status llm2slm_generation_options_set_string(llm2slm_generation_options* options, const char* name,
                                                     const char* value, llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    need(name, "name");
    need(value, "value");
    if (std::strcmp(name, "stop") == 0) {
      options->options.stop.emplace_back(value);
    } else if (std::strcmp(name, "early_stopping") == 0 && std::strcmp(value, "never") == 0) {
      options->options.early_stopping = llm2slm::EarlyStopping::never;
    } else if (std::strcmp(name, "early_stopping") == 0) {
      throw failure(ErrorCode::usage, std::string("early_stopping: must be never, got '") + value + "'", {},
                    "give never, or 0 or 1 as an int");
    } else if (std::strcmp(name, "verifier") == 0) {
      options->draft_options.verifier = value;
    } else if (std::strcmp(name, "drafter") == 0 && std::strcmp(value, "ngram") == 0) {
      options->draft_options.drafter = llm2slm::DrafterName::ngram;
    } else if (std::strcmp(name, "drafter") == 0) {
      throw failure(ErrorCode::usage, std::string("drafter: must be one of ngram, got '") + value + "'", {}, "give ngram");
    } else {
      throw unknown(name, "stop, early_stopping, drafter, verifier");
    }
  });
}

llm2slm_status llm2slm_generation_options_add_bad_word(llm2slm_generation_options* options, const int64_t* ids, size_t count,
                                                       llm2slm_error** error) {
  return guarded(error, [&] {
    need(options, "options");
    if (count > 0) need(ids, "ids");
    if (!options->options.bad_words_ids) options->options.bad_words_ids.emplace();
    options->options.bad_words_ids->emplace_back(ids, ids + count);
  });
}

void llm2slm_generation_options_free(llm2slm_generation_options* options) { delete options; }

llm2slm_status llm2slm_pair_open(const char* bundle, const llm2slm_pair_options* options, llm2slm_pair** pair,
                                 llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(pair, "pair");
    need(bundle, "bundle");
    *pair = new llm2slm_pair(llm2slm::Pair(bundle, options == nullptr ? llm2slm::Options{} : options->options));
  });
}

llm2slm_status llm2slm_pair_head(const llm2slm_pair* pair, const char* head, llm2slm_pair** opened,
                                 llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(opened, "opened");
    need(pair, "pair");
    need(head, "head");
    *opened = new llm2slm_pair(pair->pair.head(head));
  });
}

void llm2slm_pair_free(llm2slm_pair* pair) { delete pair; }
const char* llm2slm_pair_name(const llm2slm_pair* pair) {
  return pair == nullptr ? nullptr : pair->pair.name().c_str();
}
const char* llm2slm_pair_head_name(const llm2slm_pair* pair) {
  return pair == nullptr ? nullptr : pair->pair.head_name().c_str();
}
size_t llm2slm_pair_head_count(const llm2slm_pair* pair) { return pair == nullptr ? 0 : pair->heads.size(); }
const char* llm2slm_pair_head_at(const llm2slm_pair* pair, size_t index) {
  return index < llm2slm_pair_head_count(pair) ? pair->heads[index].c_str() : nullptr;
}
size_t llm2slm_pair_max_prompt_tokens(const llm2slm_pair* pair) {
  return pair == nullptr ? 0 : pair->pair.max_prompt_tokens();
}
const char* llm2slm_pair_runtime_version(const llm2slm_pair* pair) {
  return pair == nullptr ? nullptr : pair->runtime_version.c_str();
}

llm2slm_status llm2slm_generate(const llm2slm_pair* pair, const char* const* prompts, const size_t* lengths, size_t count,
                                const llm2slm_generation_options* options, llm2slm_generations** responses,
                                llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(responses, "responses");
    need(pair, "pair");
    const llm2slm::GenerationOptions none;
    *responses = new llm2slm_generations{
        pair->pair.generate(texts(prompts, lengths, count), options_of(options, none), prompt_options_of(options),
                            draft_options_of(options))};
  });
}

llm2slm_status llm2slm_stream(const llm2slm_pair* pair, const char* prompt, size_t length,
                              const llm2slm_generation_options* options, llm2slm_on_step on_step, void* user,
                              llm2slm_error** error) {
  return guarded(error, [&] {
    need(pair, "pair");
    need(prompt, "prompt");
    if (on_step == nullptr) throw failure(ErrorCode::usage, "on_step is NULL.", {}, "give a function");
    const llm2slm::GenerationOptions none;
    const auto give = [&](const llm2slm::Step& step) {
      const llm2slm_step given{sizeof(llm2slm_step),
                               step.token_id,
                               step.text.c_str(),
                               step.text.size(),
                               step.finish_reason ? reason_of(*step.finish_reason) : LLM2SLM_UNFINISHED,
                               step.logprob.value_or(std::numeric_limits<float>::quiet_NaN())};
      return on_step(&given, user) != 0;
    };
    pair->pair.stream(length == SIZE_MAX ? std::string(prompt) : std::string(prompt, length), give,
                      options_of(options, none), prompt_options_of(options), draft_options_of(options));
  });
}

llm2slm_status llm2slm_encode(const llm2slm_pair* pair, const char* const* prompts, const size_t* lengths, size_t count,
                              const llm2slm_generation_options* options, llm2slm_encoding** encoding, llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(encoding, "encoding");
    need(pair, "pair");
    *encoding = new llm2slm_encoding{pair->pair.encode(texts(prompts, lengths, count), prompt_options_of(options))};
  });
}

llm2slm_status llm2slm_generate_from(const llm2slm_pair* pair, const llm2slm_encoding* encoding,
                                     const llm2slm_generation_options* options, llm2slm_generations** responses,
                                     llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(responses, "responses");
    need(pair, "pair");
    need(encoding, "encoding");
    const llm2slm::GenerationOptions none;
    *responses = new llm2slm_generations{pair->pair.generate_from(encoding->encoding, options_of(options, none),
                                                                    draft_options_of(options))};
  });
}

llm2slm_status llm2slm_encoding_save(const llm2slm_pair* pair, const llm2slm_encoding* encoding, const char* path,
                                     llm2slm_error** error) {
  return guarded(error, [&] {
    need(pair, "pair");
    need(encoding, "encoding");
    need(path, "path");
    pair->pair.save_encoding(encoding->encoding, path);
  });
}

llm2slm_status llm2slm_encoding_load(const llm2slm_pair* pair, const char* path, llm2slm_encoding** encoding,
                                     llm2slm_error** error) {
  return guarded(error, [&] {
    need_place(encoding, "encoding");
    need(pair, "pair");
    need(path, "path");
    *encoding = new llm2slm_encoding{pair->pair.load_encoding(path)};
  });
}

size_t llm2slm_encoding_size(const llm2slm_encoding* encoding) { return encoding == nullptr ? 0 : encoding->encoding.size(); }
void llm2slm_encoding_free(llm2slm_encoding* encoding) { delete encoding; }

size_t llm2slm_generations_count(const llm2slm_generations* responses) {
  return responses == nullptr ? 0 : responses->all.size();
}

const char* llm2slm_generations_text(const llm2slm_generations* responses, size_t index, size_t* length) {
  const llm2slm::Generation* found = find(responses, index);
  if (length != nullptr) *length = found == nullptr ? 0 : found->text.size();
  return found == nullptr ? nullptr : found->text.c_str();
}

const int64_t* llm2slm_generations_token_ids(const llm2slm_generations* responses, size_t index, size_t* count) {
  const llm2slm::Generation* found = find(responses, index);
  if (count != nullptr) *count = found == nullptr ? 0 : found->token_ids.size();
  return found == nullptr ? nullptr : found->token_ids.data();
}

llm2slm_finish_reason llm2slm_generations_finish_reason(const llm2slm_generations* responses, size_t index) {
  const llm2slm::Generation* found = find(responses, index);
  return found == nullptr ? LLM2SLM_UNFINISHED : reason_of(found->finish_reason);
}

const float* llm2slm_generations_logprobs(const llm2slm_generations* responses, size_t index, size_t* count) {
  const llm2slm::Generation* found = find(responses, index);
  if (count != nullptr) *count = found == nullptr ? 0 : found->token_logprobs.size();
  return found == nullptr || found->token_logprobs.empty() ? nullptr : found->token_logprobs.data();
}

double llm2slm_generations_number(const llm2slm_generations* responses, size_t index, const char* name) {
  const double none = std::numeric_limits<double>::quiet_NaN();
  const llm2slm::Generation* found = find(responses, index);
  if (found == nullptr || name == nullptr) return none;
  const llm2slm::Timings& ms = found->timings_ms;
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("prompt_tokens")) return static_cast<double>(found->prompt_tokens);
  if (is("dropped_tokens")) return static_cast<double>(found->dropped_tokens);
  if (is("batch")) return static_cast<double>(found->batch);
  if (is("sequence")) return static_cast<double>(found->sequence);
  if (is("score")) return found->score.value_or(none);
  if (is("drafted_tokens")) return found->drafted_tokens ? static_cast<double>(*found->drafted_tokens) : none;
  if (is("accepted_tokens")) return found->accepted_tokens ? static_cast<double>(*found->accepted_tokens) : none;
  if (is("tokenize")) return ms.tokenize;
  if (is("encode")) return ms.encode;
  if (is("project")) return ms.project;
  if (is("prefill")) return ms.prefill;
  if (is("decode")) return ms.decode;
  return is("total") ? ms.total() : none;
}

void llm2slm_generations_free(llm2slm_generations* responses) { delete responses; }
