// Prompts that are decoded with the same options, and what their responses are made with.
#ifndef LLM2SLM_REQUEST_HPP
#define LLM2SLM_REQUEST_HPP

#include <vector>

#include "encoding.hpp"
#include "generation_options.hpp"
#include "logits.hpp"
#include "tokenizer.hpp"

namespace llm2slm::detail {

/// What it refers to outlives it.
struct Request {
  const Encoding::Data& encoding;
  const ResolvedOptions& options;
  /// Each prompt's index among all prompts. Samples depend on it, and not on the batch.
  std::vector<std::size_t> prompts;
  /// Of the head that writes the responses.
  const Manifest& manifest;
  const Tokenizer& tokenizer;
  /// How many ids the tokenizer has; others are never generated.
  std::size_t num_tokens;

  /// Refuse logits without a finite maximum: with a NaN or +inf, or all -inf.
  ///
  /// rows: for each row of the logits, its row of the encoding. new_token: number of the token to be chosen, from 1.
  ///
  /// Throws Error(bundle): with the prompts and what is known of the cause.
  void require_finite(const Logits& logits, const std::vector<std::size_t>& rows, std::size_t new_token) const;
  /// An empty response to a row of the encoding.
  Generation blank(std::size_t row, const Timings& timings) const;
};

}  // namespace llm2slm::detail

#endif
