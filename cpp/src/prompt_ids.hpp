// From prompts to the ids the LLM reads. It refuses what cannot be read, all of it at once; it knows no model.
#ifndef LLM2SLM_PROMPT_IDS_HPP
#define LLM2SLM_PROMPT_IDS_HPP

#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tokenizer.hpp"

namespace llm2slm::detail {

/// One prompt as the LLM reads it. dropped: tokens cut because there were too many. ms: what tokenizing took.
struct PromptIds {
  std::vector<std::int64_t> ids;
  std::size_t dropped = 0;
  double ms = 0;
};

/// The ids of every prompt, through the pair's template.
///
/// truncate: cut prompts that are too long instead of refusing them. room: cut them to so many tokens, where the response leaves
/// no more.
///
/// Throws Error: `usage` (no prompts), `prompt` (prompts that are not UTF-8, empty or too long, all of them named).
std::vector<PromptIds> read_prompts(const std::vector<std::string>& prompts, const Manifest& manifest,
                                    const Tokenizer& tokenizer, bool truncate, std::optional<std::int64_t> room);

}  // namespace llm2slm::detail

#endif
