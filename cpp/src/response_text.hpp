// One response, token by token.
#ifndef LLM2SLM_RESPONSE_TEXT_HPP
#define LLM2SLM_RESPONSE_TEXT_HPP

#include "detokenizer.hpp"
#include "request.hpp"

namespace llm2slm::detail {

class ResponseText {
 public:
  /// request: that it answers; outlives it.
  explicit ResponseText(const Request& request)
      : eos_(request.manifest.special_ids.eos), text_(request.tokenizer, request.options.stop) {}

  /// Append a token. last: there is no room for another.
  Step push(std::int64_t token_id, std::optional<float> logprob, bool last);
  /// The response so far, in an empty one.
  Generation response(Generation blank) const;

 private:
  const std::vector<std::int64_t>& eos_;
  Detokenizer text_;
  std::string released_;
  std::vector<std::int64_t> ids_;
  std::vector<float> logprobs_;
  FinishReason finish_reason_ = FinishReason::length;
};

}  // namespace llm2slm::detail

#endif
