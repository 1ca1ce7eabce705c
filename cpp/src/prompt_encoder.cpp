#include "prompt_encoder.hpp"

#include <algorithm>

#include "stopwatch.hpp"

namespace llm2slm::detail {

ReadPrompts read_batch(const OrtBackend& backend, const Manifest& manifest, const std::vector<const PromptIds*>& prompts) {
  ReadPrompts read;
  std::size_t longest = 0;
  for (const PromptIds* prompt : prompts) {
    longest = std::max(longest, prompt->ids.size());
    read.prompt_tokens.push_back(prompt->ids.size());
    read.dropped_tokens.push_back(prompt->dropped);
    read.timings_ms.tokenize += prompt->ms;
  }
  // [batch, prompt], padded on the right to the longest
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(prompts.size()), static_cast<std::int64_t>(longest)};
  read.input_ids = Tensor::ids(backend.ort(), shape);
  read.mask = Tensor::ids(backend.ort(), shape);
  std::fill_n(read.input_ids->id_data(), read.input_ids->size(), manifest.special_ids.prompt_pad);
  for (std::size_t row = 0; row < prompts.size(); ++row) {
    std::copy(prompts[row]->ids.begin(), prompts[row]->ids.end(), read.input_ids->id_data() + row * longest);
    std::fill_n(read.mask->id_data() + row * longest, prompts[row]->ids.size(), 1);
  }
  const Stopwatch watch;
  read.hidden = backend.encode(read.input_ids, read.mask);
  read.timings_ms.encode = watch.ms();
  return read;
}

std::shared_ptr<const Encoding::Data> encoding_of(const ReadPrompts& read, const OrtBackend& backend, const Manifest& manifest) {
  auto data = std::make_shared<Encoding::Data>();
  data->input_ids = read.input_ids;
  data->dropped_tokens = read.dropped_tokens;
  data->timings_ms = read.timings_ms;
  const Stopwatch watch;
  data->conditioning = {backend.project(read.hidden, read.input_ids, read.mask), read.prompt_tokens};
  data->timings_ms.project = watch.ms();
  data->identity = EncodingIdentity::of(manifest);
  return data;
}

}  // namespace llm2slm::detail
