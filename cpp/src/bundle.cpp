#include "bundle.hpp"

#include <algorithm>
#include <set>

#include "error.hpp"
#include "external_data.hpp"
#include "file.hpp"

namespace llm2slm::detail {
namespace {

using Path = std::filesystem::path;

// Whether a path is below a directory; both without links.
bool inside(const Path& path, const Path& directory) {
  const auto [end, rest] = std::mismatch(directory.begin(), directory.end(), path.begin(), path.end());
  return end == directory.end() && rest != path.end();
}

// What is wrong with a file that is listed; empty: nothing.
std::string problem(const Path& directory, const FileEntry& entry) {
  std::error_code error;
  const Path path = std::filesystem::canonical(directory / entry.path, error);
  if (error) return entry.path + ": missing";
  if (!inside(path, directory)) return entry.path + ": leads out of the bundle, to " + path.string();
  try {
    const File file(path);
    if (file.size() != entry.bytes) {
      return entry.path + ": expected " + std::to_string(entry.bytes) + " bytes, got " + std::to_string(file.size());
    }
    const std::string digest = file.sha256();
    if (digest == entry.sha256) return {};
    return entry.path + ": expected sha256 " + entry.sha256.substr(0, 16) + "…, got " + digest.substr(0, 16) + "…";
  } catch (const FileError& unreadable) {
    return entry.path + ": " + unreadable.what();
  }
}

// What is wrong with the files that a graph names inside: all of them are its data, which is listed.
void check_external_data(const Path& directory, const GraphEntry& graph, std::vector<std::string>& problems) {
  const std::string beside = Path(graph.file).parent_path().generic_string();
  try {
    for (const std::string& location : external_data(File(directory / graph.file))) {
      const std::string file = beside.empty() ? location : beside + "/" + location;
      if (std::find(graph.data.begin(), graph.data.end(), file) != graph.data.end()) continue;
      problems.push_back(graph.file + ": holds weights in '" + file + "', which is not among its data");
    }
  } catch (const GraphError& error) {
    problems.push_back(graph.file + ": is no ONNX graph: " + error.what());
  } catch (const FileError& error) {
    problems.push_back(graph.file + ": " + error.what());
  }
}

std::vector<std::string> graph_problems(const Path& directory, const Manifest& bundle) {
  std::vector<std::string> problems;
  std::set<std::string> seen;
  const auto check = [&](const Manifest& head) {
    for (const auto& [name, graph] : head.graphs) {
      // Heads share their encoder.
      if (seen.insert(graph.file + '\0' + head.head).second) check_external_data(directory, graph, problems);
    }
  };
  check(bundle);
  for (const auto& [name, head] : bundle.heads) check(head);
  return problems;
}

}  // namespace

Manifest open_bundle(const std::filesystem::path& given) {
  Manifest manifest = read_manifest(given);
  const Path directory = std::filesystem::canonical(given);
  std::vector<std::string> problems;
  for (const FileEntry& entry : manifest.files) {
    std::string found = problem(directory, entry);
    if (!found.empty()) problems.push_back(std::move(found));
  }
  if (problems.empty()) problems = graph_problems(directory, manifest);
  if (!problems.empty()) {
    throw failure(ErrorCode::bundle, "The bundle " + given.string() + " is not what was built.", problems,
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
