#include "document.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "../error.hpp"
#include "../bounded_json.hpp"
#include "code_points.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

using nlohmann::json;

constexpr std::size_t kDeepest = 100;

double power_of_ten(int exponent) {
  // The nearest value, as a table of literals holds it; std::pow may be off by one unit.
  const std::string literal = "1e" + std::to_string(exponent);
  return std::strtod(literal.c_str(), nullptr);
}

/// The value of a number with a fraction or an exponent: its digits as an integer of 64 bits, cut where they are too
/// many, then one multiplication or division by a power of ten. Infinite where it is out of range.
double serde_number(const std::string& literal) {
  std::size_t at = literal[0] == '-' ? 1 : 0;
  std::uint64_t digits = 0;
  std::int64_t exponent = 0;
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  const auto is_digit = [&] { return at < literal.size() && literal[at] >= '0' && literal[at] <= '9'; };
  const auto overflows = [&](std::uint64_t digit) { return digits > (kMost - digit) / 10; };
  bool full = false;
  for (; is_digit(); ++at) {
    const auto digit = static_cast<std::uint64_t>(literal[at] - '0');
    full = full || overflows(digit);
    if (full)
      ++exponent;
    else
      digits = digits * 10 + digit;
  }
  if (at < literal.size() && literal[at] == '.') {
    // Digits that did not fit before the point do not keep those behind it from being taken, as long as they fit.
    full = false;
    for (++at; is_digit(); ++at) {
      const auto digit = static_cast<std::uint64_t>(literal[at] - '0');
      full = full || overflows(digit);
      if (!full) {
        digits = digits * 10 + digit;
        --exponent;
      }
    }
  }
  if (at < literal.size() && (literal[at] == 'e' || literal[at] == 'E')) {
    ++at;
    bool negative = false;
    if (at < literal.size() && (literal[at] == '+' || literal[at] == '-')) negative = literal[at++] == '-';
    std::int64_t written = 0;
    for (; is_digit(); ++at) written = std::min<std::int64_t>(written * 10 + (literal[at] - '0'), 100000000);
    exponent += negative ? -written : written;
  }
  auto value = static_cast<double>(digits);
  while (value != 0.0) {
    const std::int64_t size = exponent < 0 ? -exponent : exponent;
    if (size <= 308) {
      value =
          exponent >= 0 ? value * power_of_ten(static_cast<int>(size)) : value / power_of_ten(static_cast<int>(size));
      break;
    }
    if (exponent > 0) return std::numeric_limits<double>::infinity();
    value /= 1e308;
    exponent += 308;
  }
  return literal[0] == '-' ? -value : value;
}

/// Numbers as serde_json reads them.
class Builder : public JsonTree {
 public:
  using JsonTree::JsonTree;

  bool number_float(number_float_t /*nearest*/, const string_t& literal) override {
    return JsonTree::number_float(serde_number(literal), literal);
  }
};

}  // namespace

json parse_document(std::string_view text, const std::string& name) {
  Builder builder(kDeepest);
  if (!json::sax_parse(text, &builder))
    throw failure(ErrorCode::bundle, name + " cannot be read as JSON", {builder.problem}, "Build the bundle again.");
  return std::move(builder.root);
}

bool Part::has(const char* field) const {
  const auto found = value_->is_object() ? value_->find(field) : value_->end();
  return found != value_->end() && !found->is_null();
}

Part Part::at(const char* field) const {
  const auto found = value_->is_object() ? value_->find(field) : value_->end();
  if (found == value_->end()) throw refused(std::string("the field ") + field + " is missing");
  return {*found, where_ + "." + field};
}

Part Part::at(std::size_t index) const {
  if (index >= size()) throw refused("it has no element " + std::to_string(index));
  return {(*value_)[index], where_ + "[" + std::to_string(index) + "]"};
}

std::size_t Part::size() const {
  if (!value_->is_array()) throw refused("it is not an array");
  return value_->size();
}

const std::string& Part::text() const {
  if (!value_->is_string()) throw refused("it is not a string");
  return value_->get_ref<const std::string&>();
}

bool Part::flag() const {
  if (!value_->is_boolean()) throw refused("it is neither true nor false");
  return value_->get<bool>();
}

std::uint32_t Part::id() const {
  if (value_->is_number_unsigned()) {
    const auto value = value_->get<std::uint64_t>();
    if (value <= std::numeric_limits<std::uint32_t>::max()) return static_cast<std::uint32_t>(value);
  }
  throw refused("it is not a 32-bit unsigned integer");
}

std::size_t Part::count() const {
  if (!value_->is_number_unsigned()) throw refused("it is not an unsigned integer");
  return value_->get<std::size_t>();
}

double Part::number() const {
  if (!value_->is_number()) throw refused("it is not a number");
  return value_->get<double>();
}

char32_t Part::character() const {
  const std::string& content = text();
  if (content.empty() || length_of(content[0]) != content.size()) throw refused("it is not one character");
  return code_point_at(content, 0);
}

bool Part::flag_or(const char* field, bool otherwise) const { return has(field) ? at(field).flag() : otherwise; }

std::string Part::type() const {
  if (!has("type")) throw refused("it has no type");
  return at("type").text();
}

Error Part::refused(const std::string& why) const {
  return failure(ErrorCode::bundle, where_ + " cannot be used: " + why, {},
                 "Build the bundle with a tokenizer that is described as documented.");
}

Error Part::unknown_type(const char* component) const {
  return failure(ErrorCode::bundle, std::string("The ") + component + " " + type() + " is not supported",
                 {"at " + where_}, "Use a tokenizer without it, or run the bundle with the Python package.");
}

}  // namespace llm2slm::detail::tokenizing
