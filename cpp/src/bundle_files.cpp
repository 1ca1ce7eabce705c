#include "bundle_files.hpp"

#include <algorithm>
#include <set>

#include "external_data.hpp"
#include "regular_file.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

using Path = std::filesystem::path;

constexpr std::size_t kLongestPath = 512;
constexpr std::size_t kFilesShown = 3;

// Whether a path is below a directory; both without links.
bool inside(const Path& path, const Path& directory) {
  const auto [end, rest] = std::mismatch(directory.begin(), directory.end(), path.begin(), path.end());
  return end == directory.end() && rest != path.end();
}

// The problem of a listed file; empty if there is none.
std::string problem_of(const Path& directory, const FileEntry& entry) {
  std::error_code error;
  const Path path = std::filesystem::canonical(directory / entry.path, error);
  if (error == std::errc::no_such_file_or_directory || error == std::errc::not_a_directory) return "missing";
  if (error) return "cannot be read: " + error.message();
  if (!inside(path, directory)) return "is a link that leaves the bundle";
  try {
    const RegularFile file(path);
    if (file.size() != static_cast<std::uint64_t>(entry.bytes)) {
      return "expected " + std::to_string(entry.bytes) + " bytes, got " + std::to_string(file.size());
    }
    const std::string digest = file.sha256();
    if (digest == entry.sha256) return {};
    return "expected sha256 " + entry.sha256.substr(0, 16) + "…, got " + digest.substr(0, 16) + "…";
  } catch (const FileError& unreadable) {
    return std::string("cannot be read: ") + unreadable.what();
  }
}

// Files of one set that another lacks, the first few of them.
std::string lacking(const std::set<std::string>& files, const std::set<std::string>& other) {
  std::vector<std::string> missing;
  std::set_difference(files.begin(), files.end(), other.begin(), other.end(), std::back_inserter(missing));
  std::string text;
  for (std::size_t i = 0; i < std::min(missing.size(), kFilesShown); ++i) text += (i == 0 ? "" : ", ") + python_repr(missing[i]);
  return text;
}

std::string data_problem(const Path& directory, const GraphEntry& graph) {
  std::set<std::string> read;
  const std::size_t slash = graph.file.rfind('/');
  const std::string beside = slash == std::string::npos ? "" : graph.file.substr(0, slash + 1);
  try {
    // As they are written: `./x` and `x` are one file to a runtime, and would be two here.
    for (const std::string& name : external_data(RegularFile(directory / graph.file))) {
      read.insert(path_problem(name).empty() ? beside + name : name);
    }
  } catch (const OnnxError& error) {
    return graph.file + " is not an ONNX model: " + error.what();
  } catch (const FileError& error) {
    return graph.file + " cannot be read: " + error.what();
  }
  const std::set<std::string> data(graph.data.begin(), graph.data.end());
  if (const std::string unlisted = lacking(read, data); !unlisted.empty()) {
    return graph.file + " reads weights from " + unlisted + ", which is not in its `data`";
  }
  if (const std::string unread = lacking(data, read); !unread.empty()) {
    return graph.file + " reads nothing from " + unread + ", which is in its `data`";
  }
  return {};
}

}  // namespace

std::vector<std::string> path_parts(const std::string& path) {
  std::vector<std::string> parts(1);
  for (const char c : path) {
    if (c == '/') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string path_problem(const std::string& path) {
  const bool named = !path.empty() && code_point_count(path) <= kLongestPath && is_printable(path);
  if (!named || path.find('\\') != std::string::npos) return "is not the path of a file";
  const std::vector<std::string> parts = path_parts(path);
  const auto any = [&parts](const char* part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); };
  if (path[0] == '/' || any("..")) return "leaves the bundle";
  if (any("") || any(".")) return "is not written in its shortest form";
  return {};
}

std::vector<std::string> file_problems(const Path& directory, const Manifest& manifest) {
  const Path top = std::filesystem::canonical(directory);
  std::vector<std::string> problems;
  for (const FileEntry& entry : manifest.files) {
    if (const std::string found = problem_of(top, entry); !found.empty()) problems.push_back(entry.path + ": " + found);
  }
  return problems;
}

std::vector<std::string> graph_problems(const Path& directory, const Manifest& manifest) {
  std::vector<std::string> problems;
  // Of several heads each has the encoder.
  std::set<std::pair<std::string, std::vector<std::string>>> seen;
  const auto check = [&](const Manifest& head) {
    for (const auto& [name, graph] : head.graphs) {
      if (!seen.emplace(graph.file, graph.data).second) continue;
      if (const std::string found = data_problem(directory, graph); !found.empty()) problems.push_back(found);
    }
  };
  check(manifest);
  for (const auto& [name, head] : manifest.heads) check(head);
  return problems;
}

}  // namespace llm2slm::detail
