#include "response_text.hpp"

#include <algorithm>

namespace llm2slm::detail {

Step ResponseText::push(std::int64_t token_id, std::optional<float> logprob, bool last) {
  const bool eos = std::find(eos_.begin(), eos_.end(), token_id) != eos_.end();
  Step step;
  step.token_id = token_id;
  step.logprob = logprob;
  step.text = text_.push(token_id);
  if ((eos || last) && !text_.stopped()) step.text += text_.finish();
  if (eos || last) step.finish_reason = eos ? FinishReason::stop : FinishReason::length;
  if (text_.stopped()) step.finish_reason = FinishReason::stop;
  released_ += step.text;
  ids_.push_back(token_id);
  if (logprob) logprobs_.push_back(*logprob);
  if (step.finish_reason) finish_reason_ = *step.finish_reason;
  return step;
}

Generation ResponseText::response(Generation blank) const {
  blank.text = released_;
  blank.token_ids = ids_;
  blank.finish_reason = finish_reason_;
  blank.token_logprobs = logprobs_;
  return blank;
}

}  // namespace llm2slm::detail
