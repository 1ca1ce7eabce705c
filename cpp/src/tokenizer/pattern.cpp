#include "pattern.hpp"

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "../error.hpp"
#include "expression.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

struct Deleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};
template <typename Held>
using Owned = std::unique_ptr<Held, Deleter>;

constexpr std::size_t kSmallestStack = 32 * 1024, kLargestStack = 64 * 1024 * 1024;
constexpr std::uint32_t kHeapLimitKibibytes = 256 * 1024;

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

/// A class of bytes for PCRE2: one that holds these.
std::string bytes_class(const std::set<std::uint8_t>& bytes) {
  if (bytes.empty()) return "(?!)";
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "[";
  for (const std::uint8_t byte : bytes) {
    text += "\\x";
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text + "]";
}

}  // namespace

struct Pattern::Code {
  Owned<pcre2_code> code;
};

Pattern Pattern::read(const Part& pattern) {
  if (pattern.has("Regex")) return regex(pattern.at("Regex").text(), pattern);
  if (!pattern.has("String")) throw pattern.refused("a pattern is a String or a Regex");
  Pattern result;
  result.literal_ = pattern.at("String").text();
  if (result.literal_.empty()) throw pattern.refused("the pattern is empty");
  return result;
}

Pattern Pattern::regex(std::string_view expression, const Part& where) {
  const Expression parsed = parse_expression(expression, where);
  // Where one class may end and another begin, and which sets hold what follows.
  std::map<char32_t, std::vector<std::size_t>> toggles;
  toggles[0];
  for (std::size_t i = 0; i < parsed.sets.size(); ++i) {
    for (const auto& [first, last] : parsed.sets[i]) {
      toggles[first].push_back(i);
      if (last < 0x10FFFF) toggles[last + 1].push_back(i);
    }
  }
  Pattern pattern;
  std::map<std::string, std::uint8_t> numbers;
  std::vector<std::set<std::uint8_t>> classes(parsed.sets.size());
  std::string inside(parsed.sets.size(), '-');
  for (const auto& [first, changed] : toggles) {
    for (const std::size_t i : changed) inside[i] = inside[i] == '-' ? '+' : '-';
    auto found = numbers.find(inside);
    if (found == numbers.end()) {
      if (numbers.size() > 255)
        throw where.refused("the regular expression distinguishes more than 256 classes of characters");
      found = numbers.emplace(inside, static_cast<std::uint8_t>(numbers.size())).first;
      for (std::size_t i = 0; i < inside.size(); ++i)
        if (inside[i] == '+') classes[i].insert(found->second);
    }
    pattern.bounds_.push_back(first);
    pattern.classes_.push_back(found->second);
  }
  for (std::size_t point = 0; point < pattern.ascii_.size(); ++point) {
    const auto bound = std::upper_bound(pattern.bounds_.begin(), pattern.bounds_.end(), static_cast<char32_t>(point));
    pattern.ascii_[point] = pattern.classes_[static_cast<std::size_t>(bound - pattern.bounds_.begin()) - 1];
  }

  std::string text;
  for (const auto& part : parsed.parts) {
    if (const std::string* syntax = std::get_if<std::string>(&part))
      text += *syntax;
    else
      text += bytes_class(classes[std::get<std::size_t>(part)]);
  }
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_shared<Code>();
  code->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                 PCRE2_NO_AUTO_CAPTURE | PCRE2_NEVER_UTF, &error, &offset, nullptr));
  if (!code->code)
    throw where.refused("the regular expression " + std::string(expression.substr(0, 200)) +
                        " is not supported: " + message_of(error));
  // Without a just-in-time compiler, or where it fails, the same is interpreted.
  pcre2_jit_compile(code->code.get(), PCRE2_JIT_COMPLETE);
  std::uint32_t empty = 0;
  pcre2_pattern_info(code->code.get(), PCRE2_INFO_MATCHEMPTY, &empty);
  pattern.may_be_empty_ = empty != 0;
  pattern.code_ = std::move(code);
  return pattern;
}

std::uint8_t Pattern::class_of(char32_t point) const {
  if (point < 0x80) return ascii_[point];
  const auto bound = std::upper_bound(bounds_.begin(), bounds_.end(), point);
  return classes_[static_cast<std::size_t>(bound - bounds_.begin()) - 1];
}

std::vector<Match> Pattern::matches(std::string_view text) const {
  std::vector<Match> found;
  if (text.empty()) return {{0, 0, false}};
  std::size_t last = 0;
  const auto add = [&](std::size_t begin, std::size_t end) {
    if (last != begin) found.push_back({last, begin, false});
    found.push_back({begin, end, true});
    last = end;
  };
  if (!code_) {
    for (std::size_t at = text.find(literal_); at != std::string_view::npos;
         at = text.find(literal_, at + literal_.size()))
      add(at, at + literal_.size());
    if (last != text.size()) found.push_back({last, text.size(), false});
    return found;
  }

  // One byte for each code point, and where each begins; the latter is clear where all are ASCII.
  std::vector<std::uint8_t> subject;
  subject.reserve(text.size() + 1);
  std::vector<std::size_t> offsets;
  if (is_ascii(text)) {
    for (const char byte : text) subject.push_back(ascii_[static_cast<unsigned char>(byte)]);
  } else {
    offsets.reserve(text.size() + 1);
    for_each_code_point(text, [&](char32_t point, std::size_t offset, std::size_t) {
      subject.push_back(class_of(point));
      offsets.push_back(offset);
    });
    offsets.push_back(text.size());
  }
  const auto offset_of = [&](std::size_t index) { return offsets.empty() ? index : offsets[index]; };

  const Owned<pcre2_match_data> data(pcre2_match_data_create(1, nullptr));
  if (!data) throw std::bad_alloc();
  Owned<pcre2_match_context> context;
  Owned<pcre2_jit_stack> stack;
  std::optional<std::size_t> last_end;
  for (std::size_t start = 0; start <= subject.size();) {
    const auto search = [&](std::uint32_t options) {
      return pcre2_match(code_->code.get(), subject.data(), subject.size(), start, options, data.get(), context.get());
    };
    int result = search(0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT && !context) {
      context.reset(pcre2_match_context_create(nullptr));
      stack.reset(pcre2_jit_stack_create(kSmallestStack, kLargestStack, nullptr));
      if (!context || !stack) throw std::bad_alloc();
      pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
      pcre2_set_heap_limit(context.get(), kHeapLimitKibibytes);
      result = search(0);
      if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = search(PCRE2_NO_JIT);
    }
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0)
      throw failure(ErrorCode::bundle, "A regular expression of the tokenizer cannot be searched for in this text",
                    {message_of(result)}, "Shorten the text.");
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data.get());
    // An empty match right behind another one is passed over.
    if (span[0] == span[1] && last_end == span[1]) {
      ++start;
      continue;
    }
    start = span[1];
    last_end = span[1];
    add(offset_of(span[0]), offset_of(span[1]));
  }
  if (last != text.size()) found.push_back({last, text.size(), false});
  return found;
}

}  // namespace llm2slm::detail::tokenizing
