#include "draft_options.hpp"

#include <sstream>

#include "error.hpp"

namespace llm2slm::detail {
namespace {

constexpr std::int64_t kMostDraftTokens = 64;

void refuse(const std::vector<std::string>& problems, const std::string& remedy) {
  if (!problems.empty()) throw failure(ErrorCode::usage, "These drafting options cannot be used.", problems, remedy);
}

}  // namespace

void check_draft_options(const DraftOptions& o) {
  std::vector<std::string> problems;
  if (o.drafter && o.defer) problems.emplace_back("drafter and defer: prompt lookup has no probability to defer by");
  // Python drafts with both; here the pair drafts.
  if (o.drafter && o.verifier) problems.emplace_back("drafter and verifier: with a verifier the pair itself drafts");
  if (o.defer && !(*o.defer >= 0 && *o.defer <= 1)) {
    std::ostringstream got;
    got << *o.defer;
    problems.push_back("defer: must be a number from 0 to 1, got " + got.str());
  }
  if (o.num_draft_tokens && (*o.num_draft_tokens < 1 || *o.num_draft_tokens > kMostDraftTokens)) {
    problems.push_back("num_draft_tokens: must be a whole number from 1 to " + std::to_string(kMostDraftTokens) + ", got " +
                       std::to_string(*o.num_draft_tokens));
  }
  if (o.defer && !o.verifier) problems.emplace_back("defer: has no effect without verifier");
  if (o.num_draft_tokens && !is_given(o)) problems.emplace_back("num_draft_tokens: has no effect without drafter or verifier");
  refuse(problems, "fix or remove these options");
}

void check_drafted(const DraftOptions& options, const ResolvedOptions& generation) {
  if (!is_given(options)) return;
  std::vector<std::string> problems;
  if (generation.num_beams > 1) {
    problems.push_back("num_beams: " + std::to_string(generation.num_beams) + "; a beam is known only at its end");
  }
  if (generation.num_return_sequences > 1) {
    problems.push_back("num_return_sequences: " + std::to_string(generation.num_return_sequences) + "; a draft is for one response");
  }
  if (generation.output_scores && options.defer) {
    problems.emplace_back("output_scores: with defer the verifier does not score every token");
  }
  refuse(problems, "remove these options, or those of drafting (drafter, verifier, defer)");
}

}  // namespace llm2slm::detail
