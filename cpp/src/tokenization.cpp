#include "tokenization.hpp"

#include <algorithm>

#include "error.hpp"
#include "stopwatch.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

constexpr const char* kPlace = "{prompt}";
// As in inference/tokenization.py. A longer text's first characters are tokenized first, and never more than kMostParts times as
// many. A beginning with more than twice the maximum tokens plus kClearlyTooLong is not that of a text that fits.
constexpr std::size_t kFirstCharacters = 65536, kFirstPerToken = 16, kMostParts = 16, kClearlyTooLong = 64;
constexpr std::size_t kTokensNamed = 3;

// Fill every place in the template, as Python's str.replace.
std::string filled(const std::string& prompt_template, std::string_view prompt) {
  const std::size_t width = std::char_traits<char>::length(kPlace);
  std::string text;
  std::size_t from = 0;
  for (std::size_t at = 0; (at = prompt_template.find(kPlace, from)) != std::string::npos; from = at + width) {
    text.append(prompt_template, from, at - from) += prompt;
  }
  return text.append(prompt_template, from, std::string::npos);
}

void check_prompts(const std::vector<std::string>& prompts) {
  if (prompts.empty()) throw failure(ErrorCode::usage, "There are no prompts.", {}, "give at least one prompt");
  std::vector<std::string> broken, empty;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    if (const std::optional<std::size_t> at = invalid_utf8(prompts[i])) {
      broken.push_back("prompt " + std::to_string(i) + ": byte " + std::to_string(*at) + " of " +
                       std::to_string(prompts[i].size()));
    } else if (is_blank(prompts[i])) {
      empty.push_back("prompt " + std::to_string(i));
    }
  }
  if (!broken.empty()) {
    throw failure(ErrorCode::prompt, "Some prompts are not UTF-8.", listed(broken), "convert them, or drop these bytes");
  }
  if (!empty.empty()) {
    throw failure(ErrorCode::prompt, "Some prompts are empty.", listed(empty), "remove the empty prompts, or give them text");
  }
}

// Refuse split_special_tokens if the template holds special tokens: it would split them too.
void check_template(const Manifest& manifest, const Tokenizer& tokenizer) {
  const std::size_t at = manifest.prompt_template.find(kPlace);
  if (at == std::string::npos) return;
  const std::string_view text = manifest.prompt_template;
  std::vector<std::string> held;
  for (const std::string_view part : {text.substr(0, at), text.substr(at + std::char_traits<char>::length(kPlace))}) {
    if (tokenizer.encode(part, {false, true}).ids != tokenizer.encode(part, {false, false}).ids) held.push_back(python_repr(part));
  }
  if (held.empty()) return;
  throw failure(ErrorCode::usage,
                "The prompt template of '" + manifest.name + "' has special tokens, which split_special_tokens would split.",
                held, "leave out split_special_tokens");
}

// A text's ids, or those of its first `read` of `characters` if these show that it is too long.
struct Tokenized {
  Encoded encoded;
  std::size_t read = 0, characters = 0;
};

Tokenized tokenized(const std::string& text, std::size_t most, const Tokenizer& tokenizer, const EncodeOptions& options) {
  const std::size_t first = std::max(kFirstCharacters, kFirstPerToken * most);
  Tokenized result;
  result.characters = code_point_count(text);
  result.read = std::min(result.characters, first);
  result.encoded = tokenizer.encode(std::string_view(text).substr(0, end_of_code_points(text, result.read)), options);
  if (result.read < result.characters && result.encoded.ids.size() <= 2 * most + kClearlyTooLong) {
    result.read = std::min(result.characters, first * kMostParts);
    result.encoded = tokenizer.encode(std::string_view(text).substr(0, end_of_code_points(text, result.read)), options);
  }
  return result;
}

std::size_t cut_to(Encoded& encoded, std::size_t most) {
  if (encoded.ids.size() <= most) return 0;
  const std::size_t dropped = encoded.ids.size() - most;
  // The model expects the end-of-sequence token that its tokenizer appends.
  const std::ptrdiff_t tail = encoded.ends_with_special ? 1 : 0;
  encoded.ids.erase(encoded.ids.end() - tail - static_cast<std::ptrdiff_t>(dropped), encoded.ids.end() - tail);
  return dropped;
}

std::string too_many_characters(const Tokenized& part, std::size_t most) {
  const std::string characters = std::to_string(part.characters), read = std::to_string(part.read);
  const std::size_t tokens = part.encoded.ids.size();
  if (tokens <= most) return characters + " characters, at most " + read;
  return std::to_string(tokens) + " tokens in the first " + read + " of " + characters + " characters, at most " +
         std::to_string(most);
}

// The tokens without a row in the pair's tables; empty if there are none.
std::string without_rows(const std::vector<std::int64_t>& ids, std::optional<std::int64_t> rows, const Tokenizer& tokenizer) {
  std::vector<std::int64_t> beyond;
  for (const std::int64_t id : ids) {
    if (rows && id >= *rows && std::find(beyond.begin(), beyond.end(), id) == beyond.end()) beyond.push_back(id);
  }
  if (beyond.empty()) return {};
  std::string text;
  for (std::size_t i = 0; i < std::min(beyond.size(), kTokensNamed); ++i) {
    const std::string* token = tokenizer.token_of(beyond[i]);
    text += (i > 0 ? ", " : "") + (token != nullptr ? python_repr(*token) : "None") + " (id " + std::to_string(beyond[i]) + ")";
  }
  if (beyond.size() > kTokensNamed) text += ", " + std::to_string(beyond.size() - kTokensNamed) + " more";
  return text + ": the pair's tables have " + std::to_string(*rows) + " rows";
}

std::string remedy_for(bool too_long, bool unknown, bool split) {
  const std::string cuts = "shorten these prompts, or set truncate";
  const std::string cure = split ? "remove these tokens"
                                 : "remove these tokens, or, if they are special tokens, tokenize them as text with "
                                   "split_special_tokens";
  if (too_long && unknown) return cuts + "; " + cure;
  return unknown ? cure : cuts;
}

}  // namespace

std::vector<PromptIds> tokenize_prompts(const std::vector<std::string>& prompts, const Manifest& manifest,
                                        const Tokenizer& tokenizer, const PromptOptions& prompt_options,
                                        std::optional<std::int64_t> room) {
  check_prompts(prompts);
  if (prompt_options.split_special_tokens) check_template(manifest, tokenizer);
  const EncodeOptions options{manifest.prompt_special_tokens, prompt_options.split_special_tokens};
  const auto most = static_cast<std::size_t>(manifest.max_prompt_tokens);
  const std::size_t cut = room ? std::min(most, static_cast<std::size_t>(std::max<std::int64_t>(1, *room))) : most;
  std::vector<PromptIds> rows;
  std::vector<std::string> problems;
  bool too_long = false, unknown = false;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const Stopwatch watch;
    const std::string_view prompt = manifest.prompt_strip ? stripped(prompts[i]) : std::string_view(prompts[i]);
    Tokenized part = tokenized(filled(manifest.prompt_template, prompt), most, tokenizer, options);
    PromptIds row;
    if (prompt_options.truncate) row.dropped = cut_to(part.encoded, cut);
    const std::size_t tokens = part.encoded.ids.size();
    std::string problem;
    if (!prompt_options.truncate && part.read < part.characters) {
      problem = too_many_characters(part, most);
    } else if (tokens == 0) {
      problem = "no tokens";
    } else if (tokens > most) {
      problem = std::to_string(tokens) + " tokens, at most " + std::to_string(most);
    }
    too_long = too_long || !problem.empty();
    if (problem.empty()) {
      problem = without_rows(part.encoded.ids, manifest.prompt_vocab, tokenizer);
      unknown = unknown || !problem.empty();
    }
    if (!problem.empty()) problems.push_back("prompt " + std::to_string(i) + ": " + problem);
    // Ids of a refused call are not kept: there may be a hundred thousand prompts.
    if (problems.empty()) row.ids = std::move(part.encoded.ids);
    row.ms = watch.ms();
    rows.push_back(std::move(row));
  }
  if (!problems.empty()) {
    throw failure(ErrorCode::prompt,
                  std::to_string(problems.size()) + " of " + std::to_string(rows.size()) + " prompts cannot be run by '" +
                      manifest.name + "'.",
                  listed(problems), remedy_for(too_long, unknown, prompt_options.split_special_tokens));
  }
  return rows;
}

}  // namespace llm2slm::detail
