#include "bounded_json.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

namespace llm2slm::detail {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kShown = 300;
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

// Refuses what the Python package's parser refuses.
class StrictTree : public JsonTree {
 public:
  using JsonTree::JsonTree;

  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return beyond(std::to_string(value));
    return put(value);
  }

  bool number_float(number_float_t value, const string_t& literal) override {
    // The parser gives a float for an integer beyond 64 bits.
    if (literal.find_first_of(".eE") == std::string::npos) return beyond(literal);
    return JsonTree::number_float(value, literal);
  }

 protected:
  bool twice(const std::string& name) override { return stop("an object has the name '" + name.substr(0, kShown) + "' twice"); }

 private:
  bool beyond(const std::string& literal) { return stop("the number " + literal.substr(0, 20) + "… is beyond 64 bits"); }
};

}  // namespace

Json parse_json(std::string_view text, std::size_t most_bytes, std::size_t most_depth) {
  if (text.size() > most_bytes) {
    throw JsonError("it has " + std::to_string(text.size()) + " bytes, at most " + std::to_string(most_bytes) + " are read");
  }
  // The parser would pass over it.
  if (text.substr(0, kByteOrderMark.size()) == kByteOrderMark) throw JsonError("it begins with a byte order mark");
  StrictTree tree(most_depth);
  if (!Json::sax_parse(text, &tree)) throw JsonError(tree.problem);
  return std::move(tree.root);
}

bool JsonTree::number_float(number_float_t value, const string_t& literal) {
  if (!std::isfinite(value)) return stop("the number " + literal.substr(0, 20) + " is too large");
  return put(value);
}

bool JsonTree::binary(binary_t& /*value*/) { return stop("binary data"); }

bool JsonTree::start_object(std::size_t /*size*/) { return open(Json::object()); }
bool JsonTree::start_array(std::size_t /*size*/) { return open(Json::array()); }

bool JsonTree::key(string_t& value) {
  Json& object = *open_.back();
  if (object.contains(value) && !twice(value)) return false;
  field_ = &object[std::move(value)];
  return true;
}

bool JsonTree::end_object() {
  open_.pop_back();
  return true;
}

bool JsonTree::end_array() {
  open_.pop_back();
  return true;
}

bool JsonTree::parse_error(std::size_t /*position*/, const std::string& /*token*/, const Json::exception& error) {
  // It repeats what was read last, which may be all of it.
  return stop(std::string(error.what()).substr(0, kShown));
}

bool JsonTree::put(Json value) {
  if (open_.empty()) {
    root = std::move(value);
    field_ = &root;
  } else if (open_.back()->is_array()) {
    open_.back()->push_back(std::move(value));
    field_ = &open_.back()->back();
  } else {
    *field_ = std::move(value);
  }
  return true;
}

bool JsonTree::open(Json value) {
  if (open_.size() >= most_depth_) return stop("it is nested more than " + std::to_string(most_depth_) + " levels deep");
  put(std::move(value));
  open_.push_back(field_);
  return true;
}

bool JsonTree::stop(std::string why) {
  problem = std::move(why);
  return false;
}

}  // namespace llm2slm::detail
