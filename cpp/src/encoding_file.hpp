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


/// An encoding as a file says it; views into the file's content.
struct EncodingContent {
  std::map<std::string, TensorView> conditioning;
  TensorView input_ids;
  std::vector<std::size_t> prompt_tokens, dropped_tokens;
  EncodingIdentity identity;
};

/// What a file's tensors are, where they are all that an encoding of this pair has.
///
/// Throws Error(encoding): something else, or what another pair made.
EncodingContent check_encoding(const SafetensorsFile& file, const std::string& name, const Manifest& manifest);

/// The encoding in a file's content. name: what messages call it.
///
/// Throws Error(encoding): damaged, something else, or what another pair made.
std::shared_ptr<const Encoding::Data> parse_encoding(std::string_view content, const std::string& name,
                                                     const Manifest& manifest, const std::shared_ptr<const Ort>& ort);

}  // namespace llm2slm::detail

#endif
