#include "decode_loop.hpp"

#include "beam_rows.hpp"
#include "sampled_rows.hpp"
#include "stopwatch.hpp"

namespace llm2slm::detail {
namespace {

std::vector<std::unique_ptr<RequestRows>> rows_of(const Request& request, const Drafting* drafting) {
  if (drafting != nullptr && drafting->applies(request)) return drafting->rows(request);
  std::vector<std::unique_ptr<RequestRows>> rows;
  if (request.options.num_beams > 1) {
    rows.push_back(std::make_unique<BeamRows>(request));
  } else {
    rows.push_back(std::make_unique<SampledRows>(request));
  }
  return rows;
}

}  // namespace

std::vector<std::vector<Generation>> DecodeLoop::write(const Encoding::Data& encoding, const ResolvedOptions& options,
                                                       const std::vector<std::size_t>& prompts, std::size_t batch,
                                                       const Drafting* drafting) const {
  const Request asked = request(encoding, options, prompts);
  const std::vector<std::unique_ptr<RequestRows>> groups = rows_of(asked, drafting);
  const Timings timings = run(asked, groups, drafting, [](const Timings&) { return true; });
  const auto count = static_cast<std::size_t>(options.num_return_sequences);
  std::vector<std::vector<Generation>> by_prompt(prompts.size());
  std::size_t i = 0;
  for (const auto& group : groups) {
    for (Generation& response : group->responses(timings)) {
      response.batch = batch;
      response.sequence = i % count;
      by_prompt[i++ / count].push_back(std::move(response));
    }
  }
  return by_prompt;
}

void DecodeLoop::stream(const Encoding::Data& encoding, const ResolvedOptions& options,
                        const std::function<bool(const Step&)>& step, const Drafting* drafting) const {
  const Request asked = request(encoding, options, {0});
  const std::vector<std::unique_ptr<RequestRows>> groups = rows_of(asked, drafting);
  run(asked, groups, drafting, [&](const Timings& timings) {
    for (Step now : groups[0]->last()) {
      std::vector<Generation> responses;
      if (now.finish_reason) {
        responses = groups[0]->responses(timings);
        now.generation = &responses[0];
      }
      if (!step(now)) return false;
    }
    return true;
  });
}

// Run decoder calls until all groups are finished, while `after_call`, which receives the times so far, returns true. Returns the
// times.
Timings DecodeLoop::run(const Request& request, const std::vector<std::unique_ptr<RequestRows>>& groups,
                        const Drafting* drafting, const std::function<bool(const Timings&)>& after_call) const {
  std::vector<RowGroup*> members;
  for (const auto& group : groups) members.push_back(group.get());
  Timings timings = request.encoding.timings_ms;
  Stopwatch watch;
  DecodeCore core(backend_.decoder(manifest_, request.encoding.conditioning), members,
                  drafting != nullptr ? &drafting->costs() : nullptr);
  core.start();
  timings.prefill = watch.ms();
  while (after_call(timings) && !core.finished()) {
    // The watch restarts after the callback, whose time is not the decoder's.
    watch = Stopwatch();
    core.step();
    timings.decode += watch.ms();
  }
  return timings;
}

}  // namespace llm2slm::detail
