// ONNX Runtime, found at run time: its C API, an environment of it, tensors and sessions. Nothing is linked against it.
#ifndef LLM2SLM_ORT_HPP
#define LLM2SLM_ORT_HPP

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail {

/// A loaded ONNX Runtime. ONNX Runtime itself counts who uses its environment, so the program's own use does not mind.
class Ort {
 public:
  /// Find it as Options says. Throws Error(runtime): not found, or too old; everything tried is named.
  static std::shared_ptr<const Ort> open(const Options& options);

  Ort(const OrtApiBase* base, std::string found_at);
  ~Ort();
  Ort(const Ort&) = delete;
  Ort& operator=(const Ort&) = delete;

  const OrtApi& api() const { return *api_; }
  const OrtEnv& env() const { return *env_; }
  const std::string& version() const { return version_; }
  /// Where it was found, for messages.
  const std::string& found_at() const { return found_at_; }

  /// Do nothing where a call worked. Throws Error: `out_of_memory` where that is what ONNX Runtime says, else `code`.
  void check(OrtStatus* status, ErrorCode code, const std::string& fact, const std::string& remedy) const;
  /// The same for calls that only fail by a mistake of ours or of ONNX Runtime's.
  void check(OrtStatus* status) const;

 private:
  std::string version_, found_at_;
  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
};

/// Whether a version such as "1.24.1rc2" comes before another.
bool older(const std::string& version, const std::string& other);

/// A tensor in host memory, float32 or int64.
class Tensor {
 public:
  /// Zeros.
  static std::shared_ptr<Tensor> floats(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape);
  static std::shared_ptr<Tensor> ids(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape);
  static std::shared_ptr<Tensor> ids(std::shared_ptr<const Ort> ort, std::vector<std::int64_t> shape,
                                     const std::vector<std::int64_t>& values);
  /// What a session made.
  static std::shared_ptr<Tensor> adopt(std::shared_ptr<const Ort> ort, OrtValue* value);

  Tensor(std::shared_ptr<const Ort> ort, OrtValue* value, std::unique_ptr<float[]> floats,
         std::unique_ptr<std::int64_t[]> ids);
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const OrtValue* value() const { return value_.get(); }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  bool is_float() const { return is_float_; }
  float* float_data() { return static_cast<float*>(data_); }
  const float* float_data() const { return static_cast<const float*>(data_); }
  std::int64_t* id_data() { return static_cast<std::int64_t*>(data_); }
  const std::int64_t* id_data() const { return static_cast<const std::int64_t*>(data_); }
  const void* data() const { return data_; }
  /// Elements, and their bytes.
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * (is_float_ ? sizeof(float) : sizeof(std::int64_t)); }

 private:
  std::shared_ptr<const Ort> ort_;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<std::int64_t[]> ids_;
  std::unique_ptr<OrtValue, void(ORT_API_CALL*)(OrtValue*)> value_;
  std::vector<std::int64_t> shape_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
  bool is_float_ = true;
};

/// The elements of a tensor. Throws std::bad_alloc where they are more than memory can hold.
std::size_t element_count(const std::vector<std::int64_t>& shape);

}  // namespace llm2slm::detail

#endif
