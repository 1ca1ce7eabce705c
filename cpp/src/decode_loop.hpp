// The decode loop: from an encoding to responses, one decoder call per token. Prompt texts, batching and files are not known
// here. The LLM does not run.
#ifndef LLM2SLM_DECODE_LOOP_HPP
#define LLM2SLM_DECODE_LOOP_HPP

#include <functional>
#include <vector>

#include "encoding.hpp"
#include "generation_options.hpp"
#include "tokenizer.hpp"

namespace llm2slm::detail {

class DecodeLoop {
 public:
  /// All outlive it. tokenizer: the SLM's. num_tokens: how many ids the tokenizer has; others are never generated.
  DecodeLoop(const OrtBackend& backend, const Manifest& manifest, const Tokenizer& tokenizer, std::size_t num_tokens)
      : backend_(backend), manifest_(manifest), tokenizer_(tokenizer), num_tokens_(num_tokens) {}

  /// The responses to each prompt of an encoding, `num_return_sequences` of each.
  ///
  /// prompts: index of each row's prompt among all prompts, which seeds its draws: they do not depend on the batch. batch: the
  /// encoding's number, for Generation::batch.
  std::vector<std::vector<Generation>> write(const Encoding::Data& encoding, const ResolvedOptions& options,
                                             const std::vector<std::size_t>& prompts, std::size_t batch) const;

  /// The one response to an encoding of one prompt, token by token, while `step` returns true.
  void stream(const Encoding::Data& encoding, const ResolvedOptions& options,
              const std::function<bool(const Step&)>& step) const;

 private:
  std::vector<Generation> choose(const Encoding::Data& encoding, const ResolvedOptions& options,
                                 const std::vector<std::size_t>& prompts, const std::function<bool(const Step&)>& step) const;
  std::vector<Generation> search(const Encoding::Data& encoding, const ResolvedOptions& options,
                                 const std::vector<std::size_t>& prompts) const;
  // Refuse logits without a finite maximum: with a NaN or +inf, or all -inf. rows: for each row of the logits, its row of the
  // encoding. new_token: number of the token to be chosen, from 1.
  void require_finite(const Logits& logits, const Encoding::Data& encoding, const std::vector<std::size_t>& rows,
                      const std::vector<std::size_t>& prompts, std::int64_t new_token) const;
  Generation blank(const Encoding::Data& encoding, std::size_t row) const;
  bool is_eos(std::int64_t id) const;

  const OrtBackend& backend_;
  const Manifest& manifest_;
  const Tokenizer& tokenizer_;
  std::size_t num_tokens_;
};

}  // namespace llm2slm::detail

#endif
