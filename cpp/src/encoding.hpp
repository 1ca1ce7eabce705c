// The data of an Encoding.
#ifndef LLM2SLM_ENCODING_HPP
#define LLM2SLM_ENCODING_HPP

#include "encoding_identity.hpp"
#include "ort_backend.hpp"

namespace llm2slm {

struct Encoding::Data {
  detail::Conditioning conditioning;
  /// [batch, prompt] prompt ids, padded on the right.
  std::shared_ptr<detail::Tensor> input_ids;
  std::vector<std::size_t> dropped_tokens;
  Timings timings_ms;
  detail::EncodingIdentity identity;
};

}  // namespace llm2slm

#endif
