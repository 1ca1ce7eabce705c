// A tokenizer.json as a tree, read the way the library reads it, and fields asked for by name.
#ifndef LLM2SLM_TOKENIZER_DOCUMENT_HPP
#define LLM2SLM_TOKENIZER_DOCUMENT_HPP

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "llm2slm/llm2slm.hpp"

namespace llm2slm::detail::tokenizing {

/// Parse JSON. Numbers with a fraction get the value that serde_json gives them, which is not always the nearest one.
///
/// Throws Error(bundle): no JSON, a number out of range, or more than 100 levels of nesting.
nlohmann::json parse_document(std::string_view text, const std::string& name);

/// A part of the document and where it is, for messages. It refers to the document, which outlives it.
class Part {
 public:
  Part(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& where() const { return where_; }
  bool is_null() const { return value_->is_null(); }

  /// Whether there is a field that is not null.
  bool has(const char* field) const;
  /// A field, and an element of an array. Throw Error(bundle) where there is none.
  Part at(const char* field) const;
  Part at(std::size_t index) const;
  /// Number of elements; throws Error(bundle) where this is no array.
  std::size_t size() const;

  /// This part as a value; each throws Error(bundle) where it is something else.
  const std::string& text() const;
  bool flag() const;
  std::uint32_t id() const;
  std::size_t count() const;
  double number() const;
  char32_t character() const;

  bool flag_or(const char* field, bool otherwise) const;

  /// The `type` of a component. Throws Error(bundle) where there is none.
  std::string type() const;

  /// An Error for this part.
  Error refused(const std::string& why) const;
  /// An Error for a component whose type is not known here.
  Error unknown_type(const char* component) const;

 private:
  const nlohmann::json* value_;
  std::string where_;
};

}  // namespace llm2slm::detail::tokenizing

#endif
