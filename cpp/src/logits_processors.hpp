// What transformers' logits processors and warpers make of scores, in their order. Rows are independent of each other.
#ifndef LLM2SLM_LOGITS_PROCESSORS_HPP
#define LLM2SLM_LOGITS_PROCESSORS_HPP

#include <cstdint>
#include <vector>

#include "generation_options.hpp"
#include "scores.hpp"

namespace llm2slm::detail {

using Ids = std::vector<std::int64_t>;

/// All processors and warpers that options ask for, and the ids so far, which some of them read.
class Processors {
 public:
  /// options, special_ids: outlive it. num_tokens: how many ids have scores. rows: how many sequences there are at first.
  Processors(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens, std::size_t rows);

  /// Whether the scores of the next token stay as they are.
  bool idle() const;
  /// Process the scores of a row's next token, in place. Throws Error(usage): no token is left.
  void process(std::size_t row, Row scores) const;

  std::size_t rows() const { return ids_.size(); }
  /// How many tokens have been chosen so far.
  std::size_t chosen() const { return chosen_; }
  /// Those of a row, without the decoder start token.
  Ids chosen(std::size_t row) const;
  /// Every row goes on with its token.
  void append(const Ids& ids);
  /// Go on with only these rows; a row can be there more than once.
  void keep(const std::vector<std::size_t>& rows);

 private:
  bool forbid_bad_words(Row scores, const Ids& ids) const;
  void warp(Row scores) const;

  const ResolvedOptions& options_;
  std::vector<Ids> words_;
  Ids eos_;
  std::size_t start_, least_, chosen_ = 0;
  // transformers' input_ids: they begin with the decoder start token, and a decoder-only SLM, whose prompt is embeddings, has
  // none. Penalties and bad words see that token, and lengths count it.
  std::vector<Ids> ids_;
};

}  // namespace llm2slm::detail

#endif
