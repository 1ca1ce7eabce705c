// Parts of the library by themselves, for comparison with Python: one JSON object a line in, one out.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>

#include "batching.hpp"
#include "draft_length.hpp"
#include "drafter.hpp"
#include "huge_pages.hpp"
#include "manifest.hpp"
#include "ngram_drafter.hpp"
#include "ort_backend.hpp"
#include "random.hpp"
#include "scores.hpp"
#include "sha256.hpp"
#include "utf8.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using Json = nlohmann::json;
using namespace llm2slm::detail;

#ifdef __linux__
// The address of memory that stays, apart from its neighbours; filled: in pages of 4 KiB.
std::uintptr_t mapped(std::size_t bytes, bool filled) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_DONTDUMP);
  if (filled) {
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    std::memset(memory, 1, bytes);
  }
  return reinterpret_cast<std::uintptr_t>(memory);
}

Json huge_pages(std::size_t bytes) {
  const std::uintptr_t old = mapped(bytes, true);
  const HugePages pages;
  return {{"old", old}, {"new", mapped(bytes, true)}, {"empty", mapped(bytes, false)}};
}
#endif

// The lengths of drafts that rows choose, one after another, while calls are recorded.
Json draft_lengths(const Json& events, std::size_t least) {
  CallCosts costs;
  std::unique_ptr<DraftLength> row;
  Json chosen = Json::array();
  for (const Json& event : events) {
    const std::string what = event.at(0);
    if (what == "row") row = std::make_unique<DraftLength>(costs, std::nullopt, least);
    if (what == "call") costs.add_call(event.at(1), event.at(2));
    if (what == "draft") costs.add_draft(event.at(1), event.at(2));
    if (what == "add") row->add(event.at(1), event.at(2));
    if (what == "finish") row->finish(event.at(1), event.at(2));
    if (what == "choose") chosen.push_back(row->choose());
  }
  return chosen;
}

Json ngram_drafts(const Json& request) {
  Json ids = Json::array();
  for (const DraftToken& draft : NgramDrafter(request.at("prompt")).draft(request.at("ids"), request.at("most"))) ids.push_back(draft.id);
  return ids;
}

TensorSpec float_tensor(const std::string& name, const Json& axes) {
  TensorSpec spec{name, "float32", {}};
  for (const Json& axis : axes) {
    spec.axes.push_back(axis.is_string() ? Axis{axis.get<std::string>(), 0} : Axis{"", axis.get<std::int64_t>()});
  }
  return spec;
}

// [rows · tokens · vocab]
Json as_json(const Positions& logits) {
  std::vector<float> all;
  for (std::size_t row = 0; row < logits.rows(); ++row) {
    for (std::size_t token = 0; token < logits.tokens(); ++token) {
      const float* scores = logits.at(row, token);
      all.insert(all.end(), scores, scores + logits.vocab());
    }
  }
  return all;
}

// The logits of one state of an encoder-decoder SLM's decoder: of its prefill, and of each step among its calls. No bundle's
// manifest has states of these axes, so it is made here.
Json decode(const Json& request) {
  const char* const kConditioning = "conditioning";
  Manifest manifest;
  manifest.shape.slm_kind = "encoder-decoder";
  manifest.shape.vocab_size = request.at("vocab");
  manifest.special_ids.decoder_start = request.at("start").get<std::int64_t>();
  manifest.graphs["projector"].outputs = {float_tensor(kConditioning, {"batch", "context"})};
  for (const Json& part : request.at("states")) {
    manifest.state.push_back({float_tensor(part.at("past"), part.at("axes")), float_tensor(part.at("present"), part.at("axes"))});
  }
  const std::shared_ptr<const Ort> ort = Ort::open({});
  const auto context = request.at("context").get<std::vector<std::vector<float>>>();
  const auto rows = static_cast<std::int64_t>(context.size()), positions = static_cast<std::int64_t>(context.at(0).size());
  Conditioning conditioning;
  conditioning.prompt_tokens = request.at("prompt_tokens").get<std::vector<std::size_t>>();
  conditioning.tensors[kConditioning] = Tensor::floats(ort, {rows, positions});
  float* to = conditioning.tensors[kConditioning]->float_data();
  for (const std::vector<float>& row : context) to = std::copy(row.begin(), row.end(), to);
  const std::string file = request.at("file");
  DecoderState state(std::make_shared<const Session>(ort, file, "decoder", 1), manifest, conditioning);
  Json logits = Json::array({as_json(state.prefill())});
  for (const Json& call : request.at("calls")) {
    const std::string what = call.at("call");
    const Json& values = call.at("values");
    if (what == "select") state.select(values.get<std::vector<std::size_t>>());
    if (what == "rewind") state.rewind(values.get<std::vector<std::size_t>>());
    if (what == "step") logits.push_back(as_json(state.step(values.get<Ids>())));
  }
  return logits;
}

// A result, or the library's error, as the driver gives them.
Json answered(const Json& request, Json (*answer)(const Json&)) {
  try {
    return {{"result", answer(request)}};
  } catch (const llm2slm::Error& error) {
    return {{"error", error.what()}, {"code", static_cast<int>(error.code())}};
  }
}

Json run(const Json& request) {
  const std::string what = request.at("do");
  if (what == "uniform" || what == "exponential") {
    Random random(request.at("words").get<std::vector<std::uint64_t>>());
    Json drawn = Json::array();
    for (std::size_t i = 0; i < request.at("count").get<std::size_t>(); ++i) {
      drawn.push_back(what == "uniform" ? random.uniform() : random.exponential());
    }
    return drawn;
  }
#ifdef __linux__
  if (what == "huge_pages") return huge_pages(request.at("bytes"));
#endif
  if (what == "batches") return batches(request.at("lengths"), request.at("size"));
  if (what == "capacity") return capacity_for(request.at("needed"));
  if (what == "sha256") return sha256(std::string_view(request.at("text").get_ref<const std::string&>()));
  if (what == "draft_lengths") return draft_lengths(request.at("events"), request.at("least"));
  if (what == "decode") return answered(request, decode);
  if (what == "ngram") return ngram_drafts(request);
  if (what == "repr") return python_repr(request.at("text").get_ref<const std::string&>());
  if (what == "blank") return is_blank(request.at("text").get_ref<const std::string&>());
  if (what == "older") return older(request.at("version").get<std::string>(), request.at("other").get<std::string>());
  auto scores = request.at("scores").get<std::vector<float>>();
  if (request.contains("nan")) scores[request.at("nan").get<std::size_t>()] = std::numeric_limits<float>::quiet_NaN();
  if (what == "maximum") return maximum(scores.data(), scores.size());
  if (what == "argmax") return argmax(scores.data(), scores.size());
  if (what == "highest") return highest(scores.data(), scores.size(), request.at("count"));
  if (what == "verified") {
    return verified(scores, {request.at("id"), request.at("distribution"), 0}, request.at("accept"), request.at("redraw"));
  }
  const Row row{scores.data(), scores.size()};
  const std::size_t least = request.value("least", std::size_t{1});
  if (what == "softmax") softmax(row);
  if (what == "log_softmax") log_softmax(row);
  if (what == "top_k") keep_top_k(row, request.at("value"), least);
  if (what == "top_p") keep_top_p(row, request.at("value"), least);
  if (what == "min_p") keep_min_p(row, request.at("value"), least);
  if (what == "typical_p") keep_typical_p(row, request.at("value"), least);
  Json made = Json::array();
  for (const float score : scores) made.push_back(score == kNever ? Json() : Json(score));
  return made;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << run(Json::parse(line)).dump() << std::endl;
}
