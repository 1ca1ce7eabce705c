// What the row groups of a request have in common.
#ifndef LLM2SLM_REQUEST_ROWS_HPP
#define LLM2SLM_REQUEST_ROWS_HPP

#include "decode_core.hpp"
#include "request.hpp"

namespace llm2slm::detail {

class RequestRows : public RowGroup {
 public:
  /// request: outlives it.
  RequestRows(const Request& request, std::size_t num_prompts) : request_(request), num_prompts_(num_prompts) {}

  std::size_t num_prompts() const override { return num_prompts_; }
  // The last new token is never fed.
  std::size_t room() const override { return max_new_tokens() - new_tokens_; }
  /// The steps of the last call; none of beams.
  virtual const std::vector<Step>& last() const = 0;
  /// The responses so far, those to one prompt after another.
  virtual std::vector<Generation> responses(const Timings& timings) const = 0;

 protected:
  std::size_t max_new_tokens() const { return static_cast<std::size_t>(request_.options.max_new_tokens); }

  const Request& request_;
  std::size_t num_prompts_, new_tokens_ = 0;  // of each row
};

}  // namespace llm2slm::detail

#endif
