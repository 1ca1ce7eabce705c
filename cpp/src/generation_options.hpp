// How responses are generated, resolved: which values can be used, and which of them fit together.
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
/// Throws Error(usage): naming every value that cannot be used, all that do not fit together, and every override that has no
/// effect under the others; or every option with ids of no token.
ResolvedOptions resolve_options(const GenerationDefaults& defaults, const GenerationOptions& given, std::int64_t num_tokens);

}  // namespace llm2slm::detail

#endif
