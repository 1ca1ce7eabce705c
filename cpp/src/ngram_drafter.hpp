// Prompt lookup: proposes what followed the same last tokens earlier, in the prompt or in the response.
#ifndef LLM2SLM_NGRAM_DRAFTER_HPP
#define LLM2SLM_NGRAM_DRAFTER_HPP

#include "drafter.hpp"

namespace llm2slm::detail {

class NgramDrafter : public Drafter {
 public:
  /// prompt: its ids in the SLM's tokenizer; empty if they are not known.
  explicit NgramDrafter(Ids prompt) : prompt_(std::move(prompt)) {}

  /// The tokens after the latest earlier occurrence of the longest n-gram that ends the response, n ≤ 3.
  std::vector<DraftToken> draft(const Ids& ids, std::size_t most) override;

 private:
  Ids prompt_;
};

}  // namespace llm2slm::detail

#endif
