#include "encoding_identity.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "bundle_files.hpp"
#include "error.hpp"
#include "sha256.hpp"

namespace llm2slm::detail {
namespace {

// The sha256 of each file, in the order of the paths, which the manifest cannot choose: files with swapped contents are
// distinguished.
std::vector<std::string> hashes(const Manifest& manifest, const std::vector<std::string>& files) {
  std::map<std::vector<std::string>, std::string> found;
  for (const FileEntry& entry : manifest.files) {
    if (std::find(files.begin(), files.end(), entry.path) != files.end()) found[path_parts(entry.path)] = entry.sha256;
  }
  std::vector<std::string> ordered;
  for (const auto& [parts, hash] : found) ordered.push_back(hash);
  return ordered;
}

// The sha256 of a graph's file and of its external data; open_bundle has compared `data` with the names in the graph.
std::vector<std::string> graph_hashes(const Manifest& manifest, const char* name) {
  const GraphEntry& entry = manifest.graph(name);
  std::vector<std::string> files{entry.file};
  files.insert(files.end(), entry.data.begin(), entry.data.end());
  return hashes(manifest, files);
}

// The sha256 of a list of strings as Python's json.dumps writes it.
std::string digest(const std::vector<std::string>& parts) {
  std::string text = "[";
  for (const std::string& part : parts) {
    if (text.size() > 1) text += ", ";
    text += nlohmann::json(part).dump(-1, ' ', true);
  }
  return sha256(text + "]");
}

}  // namespace

EncodingIdentity EncodingIdentity::of(const Manifest& manifest) {
  std::vector<std::string> tokenizer{manifest.prompt_template};
  if (!manifest.prompt_special_tokens) tokenizer.push_back("without special tokens");
  if (manifest.prompt_strip) tokenizer.push_back("stripped");
  for (std::string& hash : hashes(manifest, {manifest.tokenizer.llm})) tokenizer.push_back(std::move(hash));
  return {digest(graph_hashes(manifest, "encoder")), digest(graph_hashes(manifest, "projector")), digest(tokenizer)};
}

void EncodingIdentity::check(const EncodingIdentity& other, const std::string& what) const {
  std::vector<std::string> differing;
  const auto compare = [&differing](const char* name, const std::string& own, const std::string& others) {
    if (own == others) return;
    differing.push_back(std::string(name) + ": this pair has " + own.substr(0, 12) + "…, the encoding has " +
                        others.substr(0, 12) + "…");
  };
  compare("encoder", encoder, other.encoder);
  compare("projector", projector, other.projector);
  compare("tokenizer", tokenizer, other.tokenizer);
  if (differing.empty()) return;
  throw failure(ErrorCode::encoding, what + " belongs to another pair.", differing,
                "encode and generate with the same bundle and head");
}

}  // namespace llm2slm::detail
