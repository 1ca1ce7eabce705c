#include "bundle.hpp"

#include "error.hpp"
#include "sha256.hpp"

namespace llm2slm::detail {
namespace {

// What is wrong with a file; empty: nothing.
std::string problem(const std::filesystem::path& directory, const FileEntry& entry) {
  const std::filesystem::path path = directory / entry.path;
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return entry.path + ": missing";
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return entry.path + ": " + error.message();
  if (size != entry.bytes) {
    return entry.path + ": expected " + std::to_string(entry.bytes) + " bytes, got " + std::to_string(size);
  }
  try {
    const std::string digest = sha256_of_file(path);
    if (digest == entry.sha256) return {};
    return entry.path + ": expected sha256 " + entry.sha256.substr(0, 16) + "…, got " + digest.substr(0, 16) + "…";
  } catch (const std::filesystem::filesystem_error& unreadable) {
    return entry.path + ": " + unreadable.code().message();
  }
}

}  // namespace

Manifest open_bundle(const std::filesystem::path& directory) {
  Manifest manifest = read_manifest(directory);
  std::vector<std::string> problems;
  for (const FileEntry& entry : manifest.files) {
    std::string found = problem(directory, entry);
    if (!found.empty()) problems.push_back(std::move(found));
  }
  if (!problems.empty()) {
    throw failure(ErrorCode::bundle, "The bundle " + directory.string() + " is not what was built.", problems,
                  "copy it again, or build it again");
  }
  return manifest;
}

Manifest select_head(const Manifest& bundle, const std::filesystem::path& directory, const std::string& head) {
  if (head.empty() || head == bundle.head) return bundle;
  const auto found = bundle.heads.find(head);
  if (found == bundle.heads.end()) {
    std::string names = "its heads: " + bundle.head;
    for (const auto& [name, manifest] : bundle.heads) names += ", " + name;
    throw failure(ErrorCode::usage, "The bundle " + directory.string() + " has no head '" + head + "'.", {names},
                  "choose one of these");
  }
  Manifest selected = found->second;
  selected.files = bundle.files;
  return selected;
}

}  // namespace llm2slm::detail
