// The decoder half of a pair: from an encoding to responses, one decoder call after another. Prompt texts, batching and files are
// not known here. The LLM does not run.
#ifndef LLM2SLM_DECODE_LOOP_HPP
#define LLM2SLM_DECODE_LOOP_HPP

#include <functional>
#include <vector>

#include "drafting.hpp"

namespace llm2slm::detail {

class DecodeLoop {
 public:
  /// All outlive it. tokenizer: the SLM's. num_tokens: how many ids the tokenizer has; others are never generated.
  DecodeLoop(const OrtBackend& backend, const Manifest& manifest, const Tokenizer& tokenizer, std::size_t num_tokens)
      : backend_(backend), manifest_(manifest), tokenizer_(tokenizer), num_tokens_(num_tokens) {}

  /// The responses to each prompt of an encoding, `num_return_sequences` of each.
  ///
  /// prompts: index of each row's prompt among all prompts, which seeds its draws: they do not depend on the batch. batch: the
  /// encoding's number, for Generation::batch. drafting: how tokens are drafted; null: they are not.
  std::vector<std::vector<Generation>> write(const Encoding::Data& encoding, const ResolvedOptions& options,
                                             const std::vector<std::size_t>& prompts, std::size_t batch,
                                             const Drafting* drafting) const;

  /// The one response to an encoding of one prompt, token by token, while `step` returns true.
  void stream(const Encoding::Data& encoding, const ResolvedOptions& options, const std::function<bool(const Step&)>& step,
              const Drafting* drafting) const;

  /// The request of an encoding's prompts, whose indices among all are `prompts`. Encoding and options outlive it.
  Request request(const Encoding::Data& encoding, const ResolvedOptions& options, const std::vector<std::size_t>& prompts) const {
    return {encoding, options, prompts, manifest_, tokenizer_, num_tokens_};
  }

 private:
  Timings run(const Request& request, const std::vector<std::unique_ptr<RequestRows>>& groups, const Drafting* drafting,
              const std::function<bool(const Timings&)>& after_call) const;

  const OrtBackend& backend_;
  const Manifest& manifest_;
  const Tokenizer& tokenizer_;
  std::size_t num_tokens_;
};

}  // namespace llm2slm::detail

#endif
