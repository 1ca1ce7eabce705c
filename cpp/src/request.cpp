#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include "error.hpp"
#include "scores.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

// Whether a row is finite in every tensor.
bool finite(const Tensors& tensors, std::size_t row) {
  return std::all_of(tensors.begin(), tensors.end(), [row](const auto& named) {
    const Tensor& tensor = *named.second;
    const std::size_t size = tensor.size() / static_cast<std::size_t>(tensor.shape()[0]);
    const float* values = tensor.float_data() + row * size;
    return std::all_of(values, values + size, [](float value) { return std::isfinite(value); });
  });
}

}  // namespace

void Request::require_finite(const Logits& logits, const std::vector<std::size_t>& rows, std::size_t new_token) const {
  // One line per prompt: its beams or sequences usually fail together.
  std::map<std::size_t, float> found;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float most = maximum(logits[i], static_cast<std::size_t>(manifest.shape.vocab_size));
    if (!std::isfinite(most)) found[rows[i]] = most;
  }
  if (found.empty()) return;
  std::vector<std::string> evidence;
  for (const auto& [row, most] : found) {
    evidence.push_back("prompt " + std::to_string(prompts[row]) + ": the highest is " +
                       (std::isnan(most) ? "NaN" : most > 0 ? "inf" : "-inf") + "; the projector's output is " +
                       (finite(encoding.conditioning.tensors, row) ? "finite" : "not finite"));
  }
  std::string precision;
  for (const char* name : {"encoder", "projector", "decoder"}) {
    precision += (precision.empty() ? "" : ", ") + (name + (" " + manifest.graph(name).precision));
  }
  evidence.push_back("precision: " + precision + "; device: cpu");
  throw failure(ErrorCode::bundle,
                "The decoder of " + python_repr(manifest.name) + " returns non-finite logits for new token " +
                    std::to_string(new_token) + ".",
                evidence,
                "fp16 overflows above 65504: if a graph is fp16, build the bundle again with --precision bf16 or fp32 (engines: "
                "--engine-precision); otherwise look for non-finite weights in its models");
}

Generation Request::blank(std::size_t row, const Timings& timings) const {
  Generation response;
  response.prompt_tokens = encoding.conditioning.prompt_tokens[row];
  response.dropped_tokens = encoding.dropped_tokens[row];
  response.timings_ms = timings;
  return response;
}

}  // namespace llm2slm::detail
