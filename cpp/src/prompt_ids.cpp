#include "prompt_ids.hpp"

#include <algorithm>

#include "error.hpp"
#include "stopwatch.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

constexpr const char* kPlace = "{prompt}";

// Every place in the template, as Python's str.replace.
std::string filled(const std::string& prompt_template, const std::string& prompt) {
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
    throw failure(ErrorCode::prompt, "Some prompts are not UTF-8.", broken, "convert them, or drop the bytes named");
  }
  if (!empty.empty()) {
    throw failure(ErrorCode::prompt, "Some prompts are empty.", empty, "leave them out, or give them text");
  }
}

PromptIds read_one(const std::string& prompt, const Manifest& manifest, const Tokenizer& tokenizer,
                   std::optional<std::size_t> cut) {
  const Stopwatch watch;
  Encoded encoded = tokenizer.encode(filled(manifest.prompt_template, prompt));
  PromptIds row;
  row.ids = std::move(encoded.ids);
  if (cut && row.ids.size() > *cut) {
    row.dropped = row.ids.size() - *cut;
    // The model expects the end-of-sequence token that its tokenizer appends.
    const std::ptrdiff_t tail = encoded.ends_with_special ? 1 : 0;
    row.ids.erase(row.ids.end() - tail - static_cast<std::ptrdiff_t>(row.dropped), row.ids.end() - tail);
  }
  row.ms = watch.ms();
  return row;
}

}  // namespace

std::vector<PromptIds> read_prompts(const std::vector<std::string>& prompts, const Manifest& manifest,
                                    const Tokenizer& tokenizer, bool truncate, std::optional<std::int64_t> room) {
  check_prompts(prompts);
  const auto most = static_cast<std::size_t>(manifest.max_prompt_tokens);
  std::optional<std::size_t> cut;
  if (truncate) cut = room ? std::min(most, static_cast<std::size_t>(std::max<std::int64_t>(1, *room))) : most;
  std::vector<PromptIds> rows;
  std::vector<std::string> problems;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    rows.push_back(read_one(prompts[i], manifest, tokenizer, cut));
    const std::size_t tokens = rows.back().ids.size();
    const std::string name = "prompt " + std::to_string(i) + ": ";
    if (tokens == 0) problems.push_back(name + "no tokens");
    if (tokens > most) problems.push_back(name + std::to_string(tokens) + " tokens, at most " + std::to_string(most));
  }
  if (!problems.empty()) {
    throw failure(ErrorCode::prompt,
                  std::to_string(problems.size()) + " of " + std::to_string(rows.size()) + " prompts cannot be run by '" +
                      manifest.name + "'.",
                  problems, "shorten the prompts named, or have them cut with truncate");
  }
  return rows;
}

}  // namespace llm2slm::detail
