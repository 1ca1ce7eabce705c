// Which files an ONNX graph names inside to hold its weights: as little of protobuf and of ONNX as that takes. The bounds are those
// of the Python package's bundle/external_data.py.
#ifndef LLM2SLM_EXTERNAL_DATA_HPP
#define LLM2SLM_EXTERNAL_DATA_HPP

#include <set>
#include <stdexcept>
#include <string>

#include "regular_file.hpp"

namespace llm2slm::detail {

/// Why a file is no ONNX graph.
struct OnnxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Every `location` of external data in a model: of initializers, constants, and those of subgraphs and functions. They are paths
/// beside the model's file, as it says them.
///
/// It reads nothing of the weights, and holds no more than the names. Throws OnnxError: no protobuf, or beyond the bounds. Throws
/// FileError: it cannot be read.
std::set<std::string> external_data(const RegularFile& model);

}  // namespace llm2slm::detail

#endif
