#include "detokenizer.hpp"

#include <algorithm>

namespace llm2slm::detail {
namespace {

constexpr const char* kUnfinishedCharacter = "\xEF\xBF\xBD";  // U+FFFD

bool starts_with(const std::string& text, const std::string& start) { return text.compare(0, start.size(), start) == 0; }

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::size_t find_first(const std::string& text, const std::vector<std::string>& strings) {
  std::size_t first = std::string::npos;
  for (const std::string& string : strings) first = std::min(first, text.find(string));
  return first;
}

std::string Detokenizer::push(std::int64_t token_id) {
  ids_.push_back(token_id);
  const std::string found = piece();
  if (found.empty() || ends_with(found, kUnfinishedCharacter)) return {};
  start_ = read_;
  read_ = ids_.size();
  shown_ = decoded(start_);
  return release(found, false);
}

std::string Detokenizer::finish() {
  const std::string whole = decoded(0);
  return release(starts_with(whole, text_) ? whole.substr(text_.size()) : piece(), true);
}

std::string Detokenizer::decoded(std::size_t from) const {
  return tokenizer_->decode({ids_.begin() + static_cast<std::ptrdiff_t>(from), ids_.end()});
}

std::string Detokenizer::piece() const {
  const std::string window = decoded(start_);
  if (starts_with(window, shown_)) return window.substr(shown_.size());
  // The new byte makes the previous character invalid. Released text stays as it is.
  return decoded(read_);
}

std::string Detokenizer::release(const std::string& piece, bool last) {
  text_ += piece;
  held_ += piece;
  const std::size_t found = find_first(held_, *stop_);
  stopped_ = found != std::string::npos;
  const std::size_t end = stopped_ ? found : held_.size() - (last ? 0 : stop_prefix());
  std::string out = held_.substr(0, end);
  held_.erase(0, end);
  return out;
}

// The length of the longest suffix of the held text that is a prefix of a stop string.
std::size_t Detokenizer::stop_prefix() const {
  std::size_t longest = 0;
  for (const std::string& stop : *stop_) {
    for (std::size_t n = 1; n < stop.size(); ++n) {
      if (ends_with(held_, stop.substr(0, n))) longest = std::max(longest, n);
    }
  }
  return longest;
}

}  // namespace llm2slm::detail
