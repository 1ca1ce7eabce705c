// transformers' logits processors and warpers, in their order. Rows are independent of each other.
#ifndef LLM2SLM_LOGITS_PROCESSORS_HPP
#define LLM2SLM_LOGITS_PROCESSORS_HPP

#include <cstdint>
#include <vector>

#include "generation_options.hpp"
#include "scores.hpp"

namespace llm2slm::detail {

using Ids = std::vector<std::int64_t>;

/// All processors and warpers that the options ask for, and the ids so far, which some of them read.
class Processors {
 public:
  /// options, special_ids: outlive it. num_tokens: how many ids have scores. rows: how many sequences there are at first.
  Processors(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens, std::size_t rows);

  /// Whether the next token's scores stay unchanged.
  bool idle() const;
  /// Process the scores of a row's next token, in place. Throws Error(usage): no token is left.
  void process(std::size_t row, Row scores) const;

  std::size_t rows() const { return ids_.size(); }
  /// The number of tokens generated so far.
  std::size_t num_generated() const { return num_generated_; }
  /// A row's generated tokens, without the decoder start token.
  Ids generated(std::size_t row) const;
  /// Append each row's next token.
  void append(const Ids& ids);
  /// Forget all tokens but each row's first `tokens`.
  void truncate(std::size_t tokens);
  /// Keep only these rows, in this order. A row may repeat.
  void keep(const std::vector<std::size_t>& rows);

 private:
  bool forbid_bad_words(Row scores, const Ids& ids) const;
  void warp(Row scores) const;

  const ResolvedOptions& options_;
  std::vector<Ids> words_;
  Ids eos_;
  std::size_t start_, least_, num_generated_ = 0;
  // transformers' input_ids. They begin with the decoder start token, which penalties and bad words see and lengths count. A
  // decoder-only SLM has none: its prompt is embeddings.
  std::vector<Ids> ids_;
};

}  // namespace llm2slm::detail

#endif
