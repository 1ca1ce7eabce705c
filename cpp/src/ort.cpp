#include "ort.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <new>

#include "error.hpp"

namespace llm2slm::detail {
namespace {

// The calls here exist since ONNX Runtime 1.16; later releases still offer its API.
constexpr std::uint32_t kApiVersion = 16;
constexpr const char* kApiRelease = "1.16";
constexpr const char* kEnvironmentVariable = "LLM2SLM_ORT_LIBRARY";
constexpr const char* kLibrary = "libonnxruntime.so.1";

using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();

const OrtApiBase* base_in(void* library) {
  // POSIX: what dlsym returns can be a function.
  const auto get = reinterpret_cast<GetApiBase>(dlsym(library, "OrtGetApiBase"));
  return get == nullptr ? nullptr : get();
}

// The API base of a library; a failure is added to `tried`. The library is never closed: ONNX Runtime leaves threads and exit
// handlers behind.
const OrtApiBase* open_library(const std::string& path, std::vector<std::string>& tried) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    tried.push_back(path + ": " + (reason == nullptr ? "cannot be loaded" : reason));
    return nullptr;
  }
  const OrtApiBase* base = base_in(library);
  if (base == nullptr) tried.push_back(path + ": has no function OrtGetApiBase, so it is not ONNX Runtime");
  return base;
}

Error not_found(const std::vector<std::string>& tried) {
  return failure(ErrorCode::runtime, "ONNX Runtime was not found.", tried,
                 std::string("give the path of libonnxruntime.so in Options::ort_library or in the environment variable ") +
                     kEnvironmentVariable);
}

std::vector<long> numbers(const std::string& version) {
  std::vector<long> found;
  for (std::size_t at = 0; at < version.size() && found.size() < 3;) {
    if (version[at] < '0' || version[at] > '9') {
      ++at;
      continue;
    }
    const std::size_t end = version.find_first_not_of("0123456789", at);
    found.push_back(std::strtol(version.substr(at, end - at).c_str(), nullptr, 10));
    at = end;
  }
  return found;
}

}  // namespace

bool older(const std::string& version, const std::string& other) { return numbers(version) < numbers(other); }

std::shared_ptr<const Ort> Ort::open(const Options& options) {
  if (options.ort_api_base != nullptr) return std::make_shared<Ort>(options.ort_api_base, "given by the program");
  std::vector<std::string> tried;
  const char* variable = std::getenv(kEnvironmentVariable);
  const std::string named = variable == nullptr ? "" : variable;
  // A named library is the only candidate: no other one replaces it silently.
  for (const std::string& path : {options.ort_library, named}) {
    if (path.empty()) continue;
    const OrtApiBase* base = open_library(path, tried);
    if (base == nullptr) throw not_found(tried);
    return std::make_shared<Ort>(base, path);
  }
  if (const OrtApiBase* base = base_in(RTLD_DEFAULT)) return std::make_shared<Ort>(base, "loaded by the program");
  tried.emplace_back("the program itself: has no function OrtGetApiBase");
  const OrtApiBase* base = open_library(kLibrary, tried);
  if (base == nullptr) throw not_found(tried);
  return std::make_shared<Ort>(base, kLibrary);
}

Ort::Ort(const OrtApiBase* base, std::string found_at) : found_at_(std::move(found_at)) {
  const char* version = base->GetVersionString();
  version_ = version == nullptr ? "" : version;
  // GetApi is called only with a version that the library has: otherwise it prints an error.
  if (!older(version_, kApiRelease)) api_ = base->GetApi(kApiVersion);
  if (api_ == nullptr) {
    throw failure(ErrorCode::runtime, "ONNX Runtime " + version_ + " is too old: this library needs " + kApiRelease + ".",
                  {"it lacks version " + std::to_string(kApiVersion) + " of the C API", "found: " + found_at_},
                  std::string("use ONNX Runtime ") + kApiRelease + " or newer");
  }
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "llm2slm", &env_), ErrorCode::runtime,
        "ONNX Runtime " + version_ + " could not be started.", "check that its library is whole: " + found_at_);
  // Since 1.29, the official Linux builds send telemetry about sessions by default.
  if (OrtStatus* failed = api_->DisableTelemetryEvents(env_)) api_->ReleaseStatus(failed);
}

Ort::~Ort() {
  if (env_ != nullptr) api_->ReleaseEnv(env_);
}

void Ort::check(OrtStatus* status, ErrorCode code, const std::string& fact, const std::string& remedy) const {
  if (status == nullptr) return;
  const std::unique_ptr<OrtStatus, void(ORT_API_CALL*)(OrtStatus*)> owned(status, api_->ReleaseStatus);
  const std::string reason = api_->GetErrorMessage(status);
  const auto contains = [&reason](const char* words) { return reason.find(words) != std::string::npos; };
  const bool out_of_memory = contains("bad_alloc") || contains("allocate memory") || contains("out of memory");
  throw failure(out_of_memory ? ErrorCode::out_of_memory : code, fact, {"onnxruntime " + version_ + ": " + reason},
                out_of_memory ? "run fewer or shorter prompts at once, or give the process more memory" : remedy);
}

void Ort::check(OrtStatus* status) const {
  check(status, ErrorCode::runtime, "ONNX Runtime refused a call.", "run `llm2slm-export verify` on the bundle");
}

std::size_t element_count(const std::vector<std::int64_t>& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) {
    const auto factor = static_cast<std::size_t>(size);
    if (size < 0 || (factor != 0 && count > std::numeric_limits<std::size_t>::max() / 16 / factor)) throw std::bad_alloc();
    count *= factor;
  }
  return count;
}

namespace {

// A tensor over memory of ours; ONNX Runtime copies nothing.
OrtValue* value_over(const Ort& ort, void* data, std::size_t bytes, const std::vector<std::int64_t>& shape,
                     ONNXTensorElementDataType type) {
  OrtMemoryInfo* memory = nullptr;
  ort.check(ort.api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  const std::unique_ptr<OrtMemoryInfo, void(ORT_API_CALL*)(OrtMemoryInfo*)> owned(memory, ort.api().ReleaseMemoryInfo);
  OrtValue* value = nullptr;
  ort.check(ort.api().CreateTensorWithDataAsOrtValue(memory, data, bytes, shape.data(), shape.size(), type, &value));
  return value;
}

}  // namespace

std::shared_ptr<Tensor> Tensor::floats(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape) {
  const std::size_t count = element_count(shape);
  // At least one element: a tensor of none still has an address.
  auto data = std::make_unique<float[]>(std::max<std::size_t>(1, count));
  OrtValue* value = value_over(*ort, data.get(), count * sizeof(float), shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  return std::make_shared<Tensor>(std::move(ort), value, std::move(data), nullptr);
}

std::shared_ptr<Tensor> Tensor::ids(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape) {
  const std::size_t count = element_count(shape);
  auto data = std::make_unique<std::int64_t[]>(std::max<std::size_t>(1, count));
  OrtValue* value = value_over(*ort, data.get(), count * sizeof(std::int64_t), shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  return std::make_shared<Tensor>(std::move(ort), value, nullptr, std::move(data));
}

std::shared_ptr<Tensor> Tensor::ids(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape,
                                    const std::vector<std::int64_t>& values) {
  std::shared_ptr<Tensor> made = ids(std::move(ort), std::move(shape));
  std::copy(values.begin(), values.end(), made->id_data());
  return made;
}

std::shared_ptr<Tensor> Tensor::adopt(std::shared_ptr<const Ort> ort, OrtValue* value) {
  return std::make_shared<Tensor>(std::move(ort), value, nullptr, nullptr);
}

Tensor::Tensor(std::shared_ptr<const Ort> ort, OrtValue* value, std::unique_ptr<float[]> floats,
               std::unique_ptr<std::int64_t[]> ids)
    : ort_(std::move(ort)), floats_(std::move(floats)), ids_(std::move(ids)), value_(value, ort_->api().ReleaseValue) {
  const OrtApi& api = ort_->api();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ort_->check(api.GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(ORT_API_CALL*)(OrtTensorTypeAndShapeInfo*)> owned(
      info, api.ReleaseTensorTypeAndShapeInfo);
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  ort_->check(api.GetTensorElementType(info, &type));
  is_float_ = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::size_t axes = 0;
  ort_->check(api.GetDimensionsCount(info, &axes));
  shape_.resize(axes);
  ort_->check(api.GetDimensions(info, shape_.data(), axes));
  size_ = element_count(shape_);
  ort_->check(api.GetTensorMutableData(value, &data_));
}

}  // namespace llm2slm::detail
