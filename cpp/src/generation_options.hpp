// Generation options: a bundle's defaults with a caller's overrides, validated.
#ifndef LLM2SLM_GENERATION_OPTIONS_HPP
#define LLM2SLM_GENERATION_OPTIONS_HPP

#include <optional>
#include <string>
#include <vector>

#include "llm2slm/llm2slm.hpp"
#include "manifest.hpp"

namespace llm2slm::detail {

struct ResolvedOptions : GenerationDefaults {
  std::optional<std::uint64_t> seed;
  std::vector<std::string> stop;
  bool output_scores = false;
};

/// A bundle's defaults with a caller's overrides.
///
/// num_tokens: how many ids the tokenizer has.
///
/// Throws Error(usage): names every invalid value, every contradiction, and every override without effect; or every option with ids
/// beyond the tokenizer's.
ResolvedOptions resolve_options(const GenerationDefaults& defaults, const GenerationOptions& given, std::int64_t num_tokens);

}  // namespace llm2slm::detail

#endif
