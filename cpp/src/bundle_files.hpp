// The files of a bundle on disk: inside it, as listed, and nothing besides. The Python package's bundle/files.py.
#ifndef LLM2SLM_BUNDLE_FILES_HPP
#define LLM2SLM_BUNDLE_FILES_HPP

#include <filesystem>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace llm2slm::detail {

/// The components of a path with `/`.
std::vector<std::string> path_parts(const std::string& path);

/// Why a manifest's path is not that of a file inside the bundle; empty if it is.
std::string path_problem(const std::string& path);

/// Problems of a bundle's files, one line each: missing, outside the bundle, or of another size or content.
std::vector<std::string> file_problems(const std::filesystem::path& directory, const Manifest& manifest);

/// Graphs whose external data differs from the manifest's `data`, one line each. Precondition: file_problems found none.
std::vector<std::string> graph_problems(const std::filesystem::path& directory, const Manifest& manifest);

}  // namespace llm2slm::detail

#endif
