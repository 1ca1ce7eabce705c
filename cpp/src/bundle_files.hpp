// The files of a bundle on disk: inside it, as listed, and nothing besides. The Python package's bundle/files.py.
#ifndef LLM2SLM_BUNDLE_FILES_HPP
#define LLM2SLM_BUNDLE_FILES_HPP

#include <filesystem>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace llm2slm::detail {

/// What lies between a path's slashes.
std::vector<std::string> path_parts(const std::string& path);

/// Why a manifest's path is not one of a file inside the bundle; empty where it is.
std::string path_problem(const std::string& path);

/// What is wrong with a bundle's files, one line each: missing, outside, of another size or content.
std::vector<std::string> file_problems(const std::filesystem::path& directory, const Manifest& manifest);

/// Where graphs read other files than the manifest says that they do, one line each. The bundle's files have no problems.
std::vector<std::string> graph_problems(const std::filesystem::path& directory, const Manifest& manifest);

}  // namespace llm2slm::detail

#endif
