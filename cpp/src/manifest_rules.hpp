// Rules for a manifest's values beyond their types: bounds and consistency. They are those of the Python package's
// bundle/manifest_rules.py; both refuse the same manifests.
#ifndef LLM2SLM_MANIFEST_RULES_HPP
#define LLM2SLM_MANIFEST_RULES_HPP

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace llm2slm::detail {

/// A manifest's problems, one line each, beginning with the field's name.
std::vector<std::string> manifest_problems(const Manifest& manifest);

/// Where a manifest's JSON holds text that a terminal would obey, one line each; a template may hold such.
std::vector<std::string> text_problems(const nlohmann::json& raw);

}  // namespace llm2slm::detail

#endif
