// From prompts to the ids the LLM reads. It refuses what cannot be read, all of it at once; it knows no model.
#ifndef LLM2SLM_TOKENIZATION_HPP
#define LLM2SLM_TOKENIZATION_HPP

#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tokenizer.hpp"

namespace llm2slm::detail {

/// One prompt as the LLM reads it. dropped: tokens cut because there were too many; of a very long text, those of the part that was
/// tokenized. ms: what tokenizing took.
struct PromptIds {
  std::vector<std::int64_t> ids;
  std::size_t dropped = 0;
  double ms = 0;
};

/// The ids of every prompt, through the pair's template. Of a very long text only as much is tokenized as shows that it is too long.
///
/// room: cut prompts to so many tokens, where they are to be cut and the response leaves no more.
///
/// Throws Error: `usage` (no prompts; split_special_tokens, where the template holds special tokens), `prompt` (prompts that are not
/// UTF-8, empty or too long, or hold tokens that the pair has no row for: the first ones are named, all are counted).
std::vector<PromptIds> tokenize_prompts(const std::vector<std::string>& prompts, const Manifest& manifest,
                                        const Tokenizer& tokenizer, const PromptOptions& reading,
                                        std::optional<std::int64_t> room);

}  // namespace llm2slm::detail

#endif
