// Bounded parsing of untrusted JSON, as in the Python package's files/bounded_json.py. The content's meaning is not known here.
#ifndef LLM2SLM_BOUNDED_JSON_HPP
#define LLM2SLM_BOUNDED_JSON_HPP

#include <cstddef>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace llm2slm::detail {

inline constexpr std::size_t kMostJsonBytes = 8'000'000;
inline constexpr std::size_t kMostJsonDepth = 32;

/// Why a text is not JSON, or not within the bounds: one line without a full stop.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The value that JSON in UTF-8 holds.
///
/// Throws JsonError: what is not JSON, more bytes or levels than the bounds, a name twice in one object, numbers beyond 64 bits or not
/// finite.
nlohmann::json parse_json(std::string_view text, std::size_t most_bytes = kMostJsonBytes, std::size_t most_depth = kMostJsonDepth);

/// Takes a parser's events and builds the tree. It does not recurse, and neither does the parser.
class JsonTree : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonTree(std::size_t most_depth) : most_depth_(most_depth) {}

  nlohmann::json root;
  std::string problem;  // where the parser was stopped

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t& literal) override;
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t& value) override;
  bool start_object(std::size_t size) override;
  bool key(string_t& value) override;
  bool end_object() override;
  bool start_array(std::size_t size) override;
  bool end_array() override;
  bool parse_error(std::size_t position, const std::string& token, const nlohmann::json::exception& error) override;

 protected:
  bool put(nlohmann::json value);
  bool stop(std::string why);
  /// Called where an object has a name twice. The default keeps the last one.
  virtual bool twice(const std::string& /*name*/) { return true; }

 private:
  bool open(nlohmann::json value);

  std::size_t most_depth_;
  std::vector<nlohmann::json*> open_;
  nlohmann::json* field_ = nullptr;
};

}  // namespace llm2slm::detail

#endif
