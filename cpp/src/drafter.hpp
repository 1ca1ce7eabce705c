// Drafts: tokens that are proposed, and that the decoder accepts or corrects, several in one call.
#ifndef LLM2SLM_DRAFTER_HPP
#define LLM2SLM_DRAFTER_HPP

#include <cstddef>
#include <vector>

#include "logits_processors.hpp"

namespace llm2slm::detail {

/// One proposed token.
struct DraftToken {
  std::int64_t id = 0;
  /// [num_tokens] the probabilities that the drafter drew it from; empty if it did not draw.
  std::vector<float> distribution;
  /// The probability that the drafter's model gives the token, without processors; 0 if it has none.
  double confidence = 0;
};

/// Proposes the tokens after those of one response.
class Drafter {
 public:
  virtual ~Drafter() = default;
  /// At most `most` tokens that may follow `ids`, the response so far; fewer, or none, if it does not know them.
  virtual std::vector<DraftToken> draft(const Ids& ids, std::size_t most) = 0;
};

/// Speculative sampling: the token after a drawn draft, distributed as softmax(`scores`).
///
/// The draft is accepted with probability min(1, p/q); else the token is drawn from the residual max(0, p - q). Leviathan et al., "Fast
/// Inference from Transformers via Speculative Decoding", arXiv 2211.17192.
///
/// scores: [num_tokens] the verifier's processed scores. draft: with its distribution q. accept, redraw: uniform numbers in [0, 1) for
/// the two choices.
std::int64_t verified(const std::vector<float>& scores, const DraftToken& draft, double accept, double redraw);

/// The number of equal ids at the start of two sequences.
std::size_t common_prefix(const Ids& a, const Ids& b);

}  // namespace llm2slm::detail

#endif
