// One safetensors file of tensors and what they are, that appears whole or not at all and knows when it is damaged: the Python
// package's inference/encodings/safetensors_file.py. It knows no tensor's meaning.
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

/// What is said about tensors, kept with them.
using About = std::map<std::string, std::string>;

/// The tensors of a file's content and what was said about them; views into `content`.
struct SafetensorsFile {
  std::map<std::string, TensorView> tensors;
  About about;
};

/// Read a file's content. name: what messages call it.
///
/// Throws Error(encoding): it is not one that write_tensors or the Python package wrote, or it is damaged.
SafetensorsFile parse_tensors(std::string_view content, const std::string& name);

/// The same but for the checksum, which is left in what is said: the layout alone, where what was written is not to be trusted yet.
SafetensorsFile parse_layout(std::string_view content, const std::string& name);

/// The content of a file. Throws Error(encoding): there is none, or it cannot be read.
std::string read_content(const std::filesystem::path& path);

/// Write a file beside its place, wait until the disk has it, and give it its name. Only its owner can read it.
///
/// Throws Error(encoding): it cannot be written there.
void write_tensors(const std::filesystem::path& path, const std::map<std::string, TensorView>& tensors, const About& about);

}  // namespace llm2slm::detail

#endif
