#include "prompt_encoder.hpp"

#include <algorithm>

#include "stopwatch.hpp"

namespace llm2slm::detail {

std::shared_ptr<const Encoding::Data> encode_batch(const OrtBackend& backend, const Manifest& manifest,
                                                   const std::vector<const PromptIds*>& prompts) {
  auto data = std::make_shared<Encoding::Data>();
  std::size_t longest = 0;
  for (const PromptIds* prompt : prompts) {
    longest = std::max(longest, prompt->ids.size());
    data->conditioning.prompt_tokens.push_back(prompt->ids.size());
    data->dropped_tokens.push_back(prompt->dropped);
    data->timings_ms.tokenize += prompt->ms;
  }
  // [batch, prompt], padded on the right to the longest
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(prompts.size()), static_cast<std::int64_t>(longest)};
  data->input_ids = Tensor::ids(backend.ort(), shape);
  const std::shared_ptr<Tensor> mask = Tensor::ids(backend.ort(), shape);
  std::fill_n(data->input_ids->id_data(), data->input_ids->size(), manifest.special_ids.prompt_pad);
  for (std::size_t row = 0; row < prompts.size(); ++row) {
    std::copy(prompts[row]->ids.begin(), prompts[row]->ids.end(), data->input_ids->id_data() + row * longest);
    std::fill_n(mask->id_data() + row * longest, prompts[row]->ids.size(), 1);
  }
  Stopwatch watch;
  const std::shared_ptr<Tensor> hidden = backend.encode(data->input_ids, mask);
  data->timings_ms.encode = watch.ms();
  watch = Stopwatch();
  data->conditioning.tensors = backend.project(hidden, data->input_ids, mask);
  data->timings_ms.project = watch.ms();
  data->identity = EncodingIdentity::of(manifest);
  return data;
}

}  // namespace llm2slm::detail
