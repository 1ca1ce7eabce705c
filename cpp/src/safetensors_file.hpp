// A safetensors file with metadata and a checksum, written whole or not at all, as in the Python package's
// inference/encodings/safetensors_file.py. The tensors' meaning is not known here.
#ifndef LLM2SLM_SAFETENSORS_FILE_HPP
#define LLM2SLM_SAFETENSORS_FILE_HPP

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace llm2slm::detail {

/// A tensor in memory of somebody else.
struct TensorView {
  bool is_float = true;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
  std::size_t bytes = 0;
};

/// Metadata of the tensors.
using About = std::map<std::string, std::string>;

/// The tensors and the metadata of a file; views into its content.
struct SafetensorsFile {
  std::map<std::string, TensorView> tensors;
  About about;
};

/// Parse a file's content. name: the file's name in messages.
///
/// Throws Error(encoding): it is not one that write_tensors or the Python package wrote, or it is damaged.
SafetensorsFile parse_tensors(std::string_view content, const std::string& name);

/// As parse_tensors, but the checksum is not checked and stays in the metadata.
SafetensorsFile parse_layout(std::string_view content, const std::string& name);

/// The content of a file. Throws Error(encoding): there is none, or it cannot be read.
std::string read_content(const std::filesystem::path& path);

/// Write a temporary file beside `path`, flush it to disk and rename it. Only its owner can read it.
///
/// Throws Error(encoding): it cannot be written there.
void write_tensors(const std::filesystem::path& path, const std::map<std::string, TensorView>& tensors, const About& about);

}  // namespace llm2slm::detail

#endif
