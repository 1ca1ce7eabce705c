#include "session.hpp"

#include <optional>

#include "error.hpp"
#include "huge_pages.hpp"

namespace llm2slm::detail {
namespace {

// A session's threads wait for work in a busy loop, tens of milliseconds long, in the way of the next session's. What reads is
// done for now; the decoder's threads wait for its next step, which comes soon or not at all.
struct Setting {
  const char *name, *value;
};
constexpr Setting kStopSpinning{"session.force_spinning_stop", "1"};
constexpr Setting kSpinShortly{"session.intra_op.spin_duration_us", "500"};  // 1.25 does not know it, and ignores it

constexpr const char* kRemedy = "run `llm2slm-export verify` on the bundle, or build it again";

}  // namespace

Session::Session(std::shared_ptr<const Ort> ort, const std::filesystem::path& file, const std::string& graph, int threads)
    : ort_(std::move(ort)) {
  const OrtApi& api = ort_->api();
  OrtSessionOptions* options = nullptr;
  ort_->check(api.CreateSessionOptions(&options));
  const std::unique_ptr<OrtSessionOptions, void(ORT_API_CALL*)(OrtSessionOptions*)> owned(options,
                                                                                          api.ReleaseSessionOptions);
  ort_->check(api.SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_ERROR));
  const Setting waiting = graph == "decoder" ? kSpinShortly : kStopSpinning;
  ort_->check(api.AddSessionConfigEntry(options, waiting.name, waiting.value));
  if (threads > 0) ort_->check(api.SetIntraOpNumThreads(options, threads));
  // What reads multiplies many rows with each weight, and gains nothing by it.
  std::optional<HugePages> pages;
  if (graph == "decoder") pages.emplace();
  ort_->check(api.CreateSession(&ort_->env(), file.c_str(), options, &session_), ErrorCode::bundle,
              "ONNX Runtime cannot load " + file.string() + ".", kRemedy);
}

Session::~Session() { ort_->api().ReleaseSession(session_); }

Tensors Session::run(const Tensors& inputs, const std::vector<std::string>& outputs) const {
  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> values;
  for (const auto& [name, tensor] : inputs) {
    input_names.push_back(name.c_str());
    values.push_back(tensor->value());
  }
  for (const std::string& name : outputs) output_names.push_back(name.c_str());
  std::vector<OrtValue*> made(outputs.size(), nullptr);
  ort_->check(ort_->api().Run(session_, nullptr, input_names.data(), values.data(), values.size(), output_names.data(),
                              output_names.size(), made.data()),
              ErrorCode::runtime, "A graph of the bundle failed.", kRemedy);
  Tensors tensors;
  for (std::size_t i = 0; i < outputs.size(); ++i) tensors[outputs[i]] = Tensor::adopt(ort_, made[i]);
  return tensors;
}

Binding::Binding(std::shared_ptr<const Session> session) : session_(std::move(session)) {
  const Ort& ort = *session_->ort();
  ort.check(ort.api().CreateIoBinding(session_->get(), &binding_));
}

Binding::~Binding() { session_->ort()->api().ReleaseIoBinding(binding_); }

void Binding::input(const std::string& name, std::shared_ptr<Tensor> tensor) {
  const Ort& ort = *session_->ort();
  ort.check(ort.api().BindInput(binding_, name.c_str(), tensor->value()));
  inputs_[name] = std::move(tensor);
}

void Binding::output(const std::string& name, std::shared_ptr<Tensor> tensor) {
  const Ort& ort = *session_->ort();
  ort.check(ort.api().BindOutput(binding_, name.c_str(), tensor->value()));
  outputs_[name] = std::move(tensor);
}

void Binding::run() const {
  const Ort& ort = *session_->ort();
  ort.check(ort.api().RunWithBinding(session_->get(), nullptr, binding_), ErrorCode::runtime,
            "The decoder graph of the bundle failed.", kRemedy);
}

}  // namespace llm2slm::detail
