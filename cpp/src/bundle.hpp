// A bundle on disk: the manifest and the files it lists, unchanged since the build.
#ifndef LLM2SLM_BUNDLE_HPP
#define LLM2SLM_BUNDLE_HPP

#include <filesystem>
#include <string>

#include "manifest.hpp"

namespace llm2slm::detail {

/// Read the manifest and check every file it names.
///
/// Throws Error(bundle): see read_manifest; or files that are missing, truncated or altered, every one named.
Manifest open_bundle(const std::filesystem::path& directory);

/// A bundle's manifest as its head of that name; empty: its first. It has the files of the whole.
///
/// Throws Error(usage): no head has that name.
Manifest select_head(const Manifest& bundle, const std::filesystem::path& directory, const std::string& head);

}  // namespace llm2slm::detail

#endif
