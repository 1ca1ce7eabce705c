// The external data files that an ONNX graph names: a minimal protobuf walker, with the bounds of the Python package's
// bundle/external_data.py.
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
/// Weights are not read; only the names are kept. Throws OnnxError: not protobuf, or beyond the bounds. Throws FileError: it cannot
/// be read.
std::set<std::string> external_data(const RegularFile& model);

}  // namespace llm2slm::detail

#endif
