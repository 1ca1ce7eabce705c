#include "decode_loop.hpp"

#include "beam_rows.hpp"
#include "sampled_rows.hpp"
#include "stopwatch.hpp"

namespace llm2slm::detail {

std::vector<std::vector<Generation>> DecodeLoop::write(const Encoding::Data& encoding, const ResolvedOptions& options,
                                                       const std::vector<std::size_t>& prompts, std::size_t batch) const {
  const Request asked = request(encoding, options, prompts);
  std::unique_ptr<RequestRows> rows;
  if (options.num_beams > 1) {
    rows = std::make_unique<BeamRows>(asked);
  } else {
    rows = std::make_unique<SampledRows>(asked);
  }
  Timings timings;
  run(encoding, {rows.get()}, nullptr, [&timings](const Timings& now) {
    timings = now;
    return true;
  });
  const auto count = static_cast<std::size_t>(options.num_return_sequences);
  std::vector<Generation> responses = rows->responses(timings);
  std::vector<std::vector<Generation>> by_prompt(prompts.size());
  for (std::size_t i = 0; i < responses.size(); ++i) {
    responses[i].batch = batch;
    responses[i].sequence = i % count;
    by_prompt[i / count].push_back(std::move(responses[i]));
  }
  return by_prompt;
}

void DecodeLoop::stream(const Encoding::Data& encoding, const ResolvedOptions& options,
                        const std::function<bool(const Step&)>& step) const {
  const Request asked = request(encoding, options, {0});
  SampledRows rows(asked);
  run(encoding, {&rows}, nullptr, [&](const Timings& timings) {
    for (Step now : rows.last()) {
      std::vector<Generation> responses;
      if (now.finish_reason) {
        responses = rows.responses(timings);
        now.generation = &responses[0];
      }
      if (!step(now)) return false;
    }
    return true;
  });
}

// Run decoder calls until all groups are finished, while `after_call` returns true. It receives the times so far.
void DecodeLoop::run(const Encoding::Data& encoding, const std::vector<RowGroup*>& groups, CallCosts* costs,
                     const std::function<bool(const Timings&)>& after_call) const {
  Timings timings = encoding.timings_ms;
  Stopwatch watch;
  DecodeCore core(backend_.decoder(manifest_, encoding.conditioning), groups, costs);
  core.start();
  timings.prefill = watch.ms();
  while (after_call(timings) && !core.finished()) {
    // The watch restarts after the callback, whose time is not the decoder's.
    watch = Stopwatch();
    core.step();
    timings.decode += watch.ms();
  }
}

}  // namespace llm2slm::detail
