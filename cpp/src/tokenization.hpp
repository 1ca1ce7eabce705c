// Tokenization of prompts for the LLM. All prompts that cannot be run are refused at once. The model is not known here.
#ifndef LLM2SLM_TOKENIZATION_HPP
#define LLM2SLM_TOKENIZATION_HPP

#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tokenizer.hpp"

namespace llm2slm::detail {

/// One prompt's ids. dropped: tokens cut from a prompt that is too long; of a very long text, those of the tokenized part. ms:
/// tokenization time.
struct PromptIds {
  std::vector<std::int64_t> ids;
  std::size_t dropped = 0;
  double ms = 0;
};

/// The ids of every prompt, in the pair's template. A very long text is tokenized only as far as shows that it is too long.
///
/// room: the token limit that the response leaves, if prompts are to be cut.
///
/// Throws Error: `usage` (no prompts; split_special_tokens, where the template holds special tokens), `prompt` (prompts that are not
/// UTF-8, empty or too long, or hold tokens that the pair has no row for: the first ones are named, all are counted).
std::vector<PromptIds> tokenize_prompts(const std::vector<std::string>& prompts, const Manifest& manifest,
                                        const Tokenizer& tokenizer, const PromptOptions& prompt_options,
                                        std::optional<std::int64_t> room);

}  // namespace llm2slm::detail

#endif
