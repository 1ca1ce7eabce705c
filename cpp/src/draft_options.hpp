// Checks of the options of drafting.
#ifndef LLM2SLM_DRAFT_OPTIONS_HPP
#define LLM2SLM_DRAFT_OPTIONS_HPP

#include "generation_options.hpp"

namespace llm2slm::detail {

/// Whether tokens are drafted.
inline bool is_given(const DraftOptions& options) { return options.drafter || options.verifier; }

/// Throws Error(usage): options are invalid or contradict each other, all of them named.
void check_draft_options(const DraftOptions& options);

/// Throws Error(usage): tokens cannot be drafted with these generation options, all of them named.
void check_drafted(const DraftOptions& options, const ResolvedOptions& generation);

}  // namespace llm2slm::detail

#endif
