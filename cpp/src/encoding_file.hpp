// Encodings on disk: a safetensors file with the conditioning's tensors by their contract names, `input_ids` [batch, prompt],
// and as metadata format, version, bundle, head, encoder, projector, tokenizer (sha256), prompt_tokens, dropped_tokens.
#ifndef LLM2SLM_ENCODING_FILE_HPP
#define LLM2SLM_ENCODING_FILE_HPP

#include <filesystem>
#include <memory>
#include <string_view>

#include "encoding.hpp"
#include "safetensors_file.hpp"

namespace llm2slm::detail {

/// Write an encoding. Throws Error(encoding): another pair made it, or it cannot be written.
void save_encoding(const Encoding::Data& encoding, const std::filesystem::path& path, const Manifest& manifest);


/// A file's encoding, as views into the file's content.
struct EncodingContent {
  std::map<std::string, TensorView> conditioning;
  TensorView input_ids;
  std::vector<std::size_t> prompt_tokens, dropped_tokens;
  EncodingIdentity identity;
};

/// Check that a file holds exactly the tensors of an encoding of this pair, and return them.
///
/// Throws Error(encoding): not an encoding, or made by another pair.
EncodingContent check_encoding(const SafetensorsFile& file, const std::string& name, const Manifest& manifest);

/// The encoding in a file's content. name: the file's name in messages.
///
/// Throws Error(encoding): damaged, not an encoding, or made by another pair.
std::shared_ptr<const Encoding::Data> parse_encoding(std::string_view content, const std::string& name,
                                                     const Manifest& manifest, const std::shared_ptr<const Ort>& ort);

}  // namespace llm2slm::detail

#endif
