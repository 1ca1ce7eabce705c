#include "session.hpp"

#include <optional>

#include "error.hpp"
#include "huge_pages.hpp"

namespace llm2slm::detail {
namespace {

// Idle ONNX Runtime threads spin for tens of milliseconds and take cores from the next session. Encoder and projector stop spinning
// after a run; the decoder spins for 500 µs, enough to bridge two steps.
struct Setting {
  const char *name, *value;
};
constexpr Setting kStopSpinning{"session.force_spinning_stop", "1"};
constexpr Setting kSpinShortly{"session.intra_op.spin_duration_us", "500"};  // 1.25 does not know it, and ignores it

// An input or output as the graph itself declares it. An axis that is no fixed size is -1.
struct Declared {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<std::int64_t> axes;
};

Declared declared(const Ort& ort, const OrtTypeInfo& type) {
  const OrtApi& api = ort.api();
  Declared found;
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  ort.check(api.CastTypeInfoToTensorInfo(&type, &info));
  if (info == nullptr) return found;  // no tensor
  ort.check(api.GetTensorElementType(info, &found.type));
  std::size_t axes = 0;
  ort.check(api.GetDimensionsCount(info, &axes));
  found.axes.resize(axes);
  ort.check(api.GetDimensions(info, found.axes.data(), axes));
  return found;
}

std::map<std::string, Declared> declared(const Ort& ort, const OrtSession* session, bool inputs) {
  const OrtApi& api = ort.api();
  OrtAllocator* allocator = nullptr;
  ort.check(api.GetAllocatorWithDefaultOptions(&allocator));
  std::size_t count = 0;
  ort.check(inputs ? api.SessionGetInputCount(session, &count) : api.SessionGetOutputCount(session, &count));
  std::map<std::string, Declared> found;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    ort.check(inputs ? api.SessionGetInputName(session, i, allocator, &name) : api.SessionGetOutputName(session, i, allocator, &name));
    const std::string copied = name;
    ort.check(api.AllocatorFree(allocator, name));
    OrtTypeInfo* type = nullptr;
    ort.check(inputs ? api.SessionGetInputTypeInfo(session, i, &type) : api.SessionGetOutputTypeInfo(session, i, &type));
    const std::unique_ptr<OrtTypeInfo, void(ORT_API_CALL*)(OrtTypeInfo*)> owned(type, api.ReleaseTypeInfo);
    found[copied] = declared(ort, *type);
  }
  return found;
}

bool agrees(const TensorSpec& spec, const Declared& own) {
  const bool floats = spec.dtype == "float32";
  if (own.type != (floats ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)) return false;
  // A graph may leave its rank open. An axis that only one side fixes is checked by the call.
  if (own.axes.empty()) return true;
  bool same = own.axes.size() == spec.axes.size();
  for (std::size_t i = 0; same && i < own.axes.size(); ++i) {
    same = own.axes[i] < 0 || !spec.axes[i].name.empty() || own.axes[i] == spec.axes[i].size;
  }
  return same;
}

void compare(const std::vector<TensorSpec>& specs, std::map<std::string, Declared> found, const std::string& side,
             std::vector<std::string>& problems) {
  for (const TensorSpec& spec : specs) {
    const auto own = found.find(spec.name);
    if (own == found.end()) {
      problems.push_back(side + " " + spec.name + ": is missing");
      continue;
    }
    if (!agrees(spec, own->second)) problems.push_back(side + " " + spec.name + ": is of another type or shape");
    found.erase(own);
  }
  for (const auto& [name, more] : found) problems.push_back(side + " " + name + ": is not in the manifest");
}

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
  // Encoder and projector multiply many rows with each weight, and gain nothing from huge pages.
  std::optional<HugePages> pages;
  if (graph == "decoder") pages.emplace();
  ort_->check(api.CreateSession(&ort_->env(), file.c_str(), options, &session_), ErrorCode::bundle,
              "ONNX Runtime cannot load " + file.string() + ".", kRemedy);
}

void Session::check_signature(const GraphEntry& entry, const std::string& graph) const {
  std::vector<std::string> problems;
  compare(entry.inputs, declared(*ort_, session_, true), "input", problems);
  compare(entry.outputs, declared(*ort_, session_, false), "output", problems);
  if (problems.empty()) return;
  throw failure(ErrorCode::bundle, entry.file + " is not the " + graph + " that the manifest describes.", problems,
                "build the bundle again");
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
