// One graph of a bundle, loaded: an ONNX Runtime session. Several threads may run it at once.
#ifndef LLM2SLM_SESSION_HPP
#define LLM2SLM_SESSION_HPP

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "ort.hpp"

namespace llm2slm::detail {

/// Tensors by their names in the contract.
using Tensors = std::map<std::string, std::shared_ptr<Tensor>>;

class Session {
 public:
  /// graph: `encoder`, `projector` or `decoder`. threads: inside one operator; 0 leaves it to ONNX Runtime.
  ///
  /// Throws Error(bundle): this ONNX Runtime cannot load it.
  Session(std::shared_ptr<const Ort> ort, const std::filesystem::path& file, const std::string& graph, int threads);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Refuse a graph with other inputs or outputs than its manifest says: memory is laid out by what that says.
  ///
  /// Throws Error(bundle): naming them.
  void check_signature(const GraphEntry& entry, const std::string& graph) const;

  /// Run it once; the outputs are new tensors.
  Tensors run(const Tensors& inputs, const std::vector<std::string>& outputs) const;

  const std::shared_ptr<const Ort>& ort() const { return ort_; }
  OrtSession* get() const { return session_; }

 private:
  std::shared_ptr<const Ort> ort_;
  OrtSession* session_ = nullptr;
};

/// What stays bound to a session's calls, and holds it: inputs and outputs, by name.
class Binding {
 public:
  explicit Binding(std::shared_ptr<const Session> session);
  ~Binding();
  Binding(const Binding&) = delete;
  Binding& operator=(const Binding&) = delete;

  void input(const std::string& name, std::shared_ptr<Tensor> tensor);
  void output(const std::string& name, std::shared_ptr<Tensor> tensor);
  /// What is bound as an input.
  Tensor& bound(const std::string& name) const { return *inputs_.at(name); }
  const std::shared_ptr<Tensor>& shared(const std::string& name) const { return inputs_.at(name); }
  void run() const;

 private:
  std::shared_ptr<const Session> session_;
  OrtIoBinding* binding_ = nullptr;
  Tensors inputs_, outputs_;
};

}  // namespace llm2slm::detail

#endif
