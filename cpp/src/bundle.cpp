#include "bundle.hpp"

#include "bundle_files.hpp"
#include "error.hpp"

namespace llm2slm::detail {

Manifest open_bundle(const std::filesystem::path& directory) {
  Manifest manifest = read_manifest(directory);
  std::vector<std::string> problems = file_problems(directory, manifest);
  if (problems.empty()) problems = graph_problems(directory, manifest);
  if (!problems.empty()) {
    throw failure(ErrorCode::bundle, "The bundle " + directory.string() + " has changed since it was built.", problems,
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
