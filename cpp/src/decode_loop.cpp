#include "decode_loop.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "beam_search.hpp"
#include "detokenizer.hpp"
#include "error.hpp"
#include "stopwatch.hpp"
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

std::vector<std::vector<Generation>> DecodeLoop::write(const Encoding::Data& encoding, const ResolvedOptions& options,
                                                       const std::vector<std::size_t>& prompts, std::size_t batch) const {
  std::vector<Generation> responses =
      options.num_beams > 1 ? search(encoding, options, prompts) : choose(encoding, options, prompts, {});
  const auto count = static_cast<std::size_t>(options.num_return_sequences);
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
  choose(encoding, options, {0}, step);
}

// Greedy decoding or sampling. Finished rows are dropped from the batch. Rows: `num_return_sequences` for each prompt, in order.
std::vector<Generation> DecodeLoop::choose(const Encoding::Data& encoding, const ResolvedOptions& options,
                                           const std::vector<std::size_t>& prompts,
                                           const std::function<bool(const Step&)>& step) const {
  const auto count = static_cast<std::size_t>(options.num_return_sequences);
  std::vector<std::pair<std::size_t, std::size_t>> names;
  std::vector<std::size_t> rows;  // the encoding's row of each running sequence
  std::vector<Generation> responses;
  for (std::size_t row = 0; row < prompts.size(); ++row) {
    for (std::size_t sequence = 0; sequence < count; ++sequence) {
      names.emplace_back(prompts[row], sequence);
      rows.push_back(row);
      responses.push_back(blank(encoding, row));
    }
  }
  Sampler sampler(options, manifest_.special_ids, num_tokens_, names);
  std::vector<Detokenizer> texts(names.size(), Detokenizer(tokenizer_, options.stop));
  std::vector<std::size_t> running(names.size());
  std::iota(running.begin(), running.end(), std::size_t{0});
  Timings timings = encoding.timings_ms;
  Stopwatch watch;
  const std::unique_ptr<DecoderState> state = backend_.decoder(manifest_, encoding.conditioning);
  const Logits once = state->prefill();
  state->select(rows);
  Logits logits;
  for (const std::size_t row : rows) logits.push_back(once[row]);
  for (std::int64_t written = 1; !running.empty(); ++written) {
    require_finite(logits, encoding, rows, prompts, written);
    Ids ids = sampler.choose(logits);
    std::vector<std::size_t> going;
    std::vector<Step> steps(running.size());
    for (std::size_t i = 0; i < running.size(); ++i) {
      Detokenizer& text = texts[running[i]];
      Generation& response = responses[running[i]];
      Step& now = steps[i];
      now.token_id = ids[i];
      now.text = text.push(ids[i]);
      const bool eos = is_eos(ids[i]), last = written == options.max_new_tokens;
      if ((eos || last) && !text.stopped()) now.text += text.finish();
      if (eos || last) now.finish_reason = eos ? FinishReason::stop : FinishReason::length;
      if (text.stopped()) now.finish_reason = FinishReason::stop;
      if (options.output_scores) now.logprob = sampler.logprobs()[i];
      response.text += now.text;
      response.token_ids.push_back(ids[i]);
      if (now.logprob) response.token_logprobs.push_back(*now.logprob);
      if (now.finish_reason) {
        response.finish_reason = *now.finish_reason;
      } else {
        going.push_back(i);
      }
    }
    (written == 1 ? timings.prefill : timings.decode) += watch.ms();
    if (step) {
      responses[0].timings_ms = timings;
      if (going.empty()) steps[0].generation = &responses[0];
      if (!step(steps[0])) return responses;
    }
    if (going.empty()) break;
    // The watch restarts after the callback, whose time is not the decoder's.
    watch = Stopwatch();
    if (going.size() < running.size()) {
      sampler.keep(going);
      state->select(going);
      for (std::size_t i = 0; i < going.size(); ++i) {
        running[i] = running[going[i]];
        rows[i] = rows[going[i]];
        ids[i] = ids[going[i]];
      }
      running.resize(going.size());
      rows.resize(going.size());
      ids.resize(going.size());
    }
    logits = state->step(ids);
  }
  for (Generation& response : responses) response.timings_ms = timings;
  return responses;
}

// Beam search. Cache rows are moved, copied and dropped between calls.
std::vector<Generation> DecodeLoop::search(const Encoding::Data& encoding, const ResolvedOptions& options,
                                           const std::vector<std::size_t>& prompts) const {
  std::function<bool(const Ids&)> stops;
  if (!options.stop.empty()) {
    stops = [&](const Ids& ids) { return find_first(tokenizer_.decode(ids), options.stop) != std::string::npos; };
  }
  BeamSearch beams(options, manifest_.special_ids, num_tokens_, prompts, stops);
  const auto vocab = static_cast<std::size_t>(manifest_.shape.vocab_size);
  Timings timings = encoding.timings_ms;
  Stopwatch watch;
  const std::unique_ptr<DecoderState> state = backend_.decoder(manifest_, encoding.conditioning);
  Logits logits = state->prefill();
  timings.prefill = watch.ms();
  watch = Stopwatch();
  std::vector<std::size_t> rows(prompts.size());
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  for (std::int64_t written = 1;; ++written) {
    require_finite(logits, encoding, rows, prompts, written);
    const std::optional<Advance> next = beams.advance(logits, vocab);
    if (!next) break;
    state->select(next->rows);
    logits = state->step(next->ids);
    std::vector<std::size_t> following;
    for (const std::size_t row : next->rows) following.push_back(rows[row]);
    rows = std::move(following);
  }
  timings.decode = watch.ms();
  std::vector<Generation> responses;
  const std::vector<std::vector<Hypothesis>> found = beams.results();
  for (std::size_t row = 0; row < found.size(); ++row) {
    for (const Hypothesis& best : found[row]) {
      Generation response = blank(encoding, row);
      response.text = tokenizer_.decode(best.token_ids);
      response.text.resize(std::min(response.text.size(), find_first(response.text, options.stop)));
      response.token_ids = best.token_ids;
      response.finish_reason = best.finish_reason;
      response.score = static_cast<double>(best.score);
      response.token_logprobs = best.logprobs;
      response.timings_ms = timings;
      responses.push_back(std::move(response));
    }
  }
  return responses;
}

void DecodeLoop::require_finite(const Logits& logits, const Encoding::Data& encoding, const std::vector<std::size_t>& rows,
                                const std::vector<std::size_t>& prompts, std::int64_t new_token) const {
  // One line per prompt: its beams or sequences usually fail together.
  std::map<std::size_t, float> found;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float most = maximum(logits[i], static_cast<std::size_t>(manifest_.shape.vocab_size));
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
    precision += (precision.empty() ? "" : ", ") + (name + (" " + manifest_.graph(name).precision));
  }
  evidence.push_back("precision: " + precision + "; device: cpu");
  throw failure(ErrorCode::bundle,
                "The decoder of " + python_repr(manifest_.name) + " returns non-finite logits for new token " +
                    std::to_string(new_token) + ".",
                evidence,
                "fp16 overflows above 65504: if a graph is fp16, build the bundle again with --precision bf16 or fp32 (engines: "
                "--engine-precision); otherwise look for non-finite weights in its models");
}

Generation DecodeLoop::blank(const Encoding::Data& encoding, std::size_t row) const {
  Generation response;
  response.prompt_tokens = encoding.conditioning.prompt_tokens[row];
  response.dropped_tokens = encoding.dropped_tokens[row];
  return response;
}

bool DecodeLoop::is_eos(std::int64_t id) const {
  const Ids& eos = manifest_.special_ids.eos;
  return std::find(eos.begin(), eos.end(), id) != eos.end();
}

}  // namespace llm2slm::detail
