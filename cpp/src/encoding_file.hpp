// Encodings on disk: a safetensors file with the conditioning's tensors by their contract names, `input_ids` [batch, prompt],
// and as metadata format, version, bundle, head, encoder, projector, tokenizer (sha256), prompt_tokens, dropped_tokens.
#ifndef LLM2SLM_ENCODING_FILE_HPP
#define LLM2SLM_ENCODING_FILE_HPP

#include <filesystem>
#include <memory>
#include <string_view>

#include "encoding_data.hpp"

namespace llm2slm::detail {

/// Write an encoding. Throws Error(encoding): another pair made it, or it cannot be written.
void save_encoding(const Encoding::Data& encoding, const std::filesystem::path& path, const Manifest& manifest);


/// The encoding in a file's content. name: what messages call it.
///
/// Throws Error(encoding): damaged, something else, or what another pair made.
std::shared_ptr<const Encoding::Data> parse_encoding(std::string_view content, const std::string& name,
                                                     const Manifest& manifest, const std::shared_ptr<const Ort>& ort);

}  // namespace llm2slm::detail

#endif
