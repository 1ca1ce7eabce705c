#include "text.hpp"

#include <algorithm>
#include <utility>

#include "../error.hpp"

namespace llm2slm::detail::tokenizing {

void check_length(std::size_t size) {
  constexpr std::size_t kLongest = std::size_t{256} * 1024 * 1024;
  if (size > kLongest)
    throw failure(ErrorCode::bundle, "The tokenizer makes the text longer than 256 MiB", {}, "Shorten the text.");
}

Text::Text(std::string_view original, bool tracked) : text_(original), tracked_(tracked) {
  if (!tracked) return;
  starts_.assign(text_.size(), 0);
  // All bytes of a code point have its place.
  if (!text_.empty()) std::fill_n(starts_.begin(), length_of(text_[0]), 1);
}

void Text::transform(const std::vector<Change>& changes, std::size_t initial_removed) {
  std::string text;
  text.reserve(text_.size() + changes.size() / 4);
  for (const Change& change : changes) append(text, change.point);
  check_length(text.size());
  if (tracked_) {
    std::vector<char> starts;
    starts.reserve(text.size());
    std::size_t old = 0;
    const auto skip = [&](std::size_t count) {
      for (; count > 0 && old < text_.size(); --count) old += length_of(text_[old]);
    };
    skip(initial_removed);
    for (const Change& change : changes) {
      char start = 0;
      if (change.change > 0) {
        start = old == 0 ? static_cast<char>(at_start_) : starts_[old - 1];
      } else {
        if (old >= text_.size())
          throw failure(ErrorCode::internal, "A normalizer replaced more characters than the text has", {},
                        "Please report this.");
        start = starts_[old];
        skip(1 + static_cast<std::size_t>(-change.change));
      }
      const std::size_t length = change.point < 0x80 ? 1 : change.point < 0x800 ? 2 : change.point < 0x10000 ? 3 : 4;
      starts.insert(starts.end(), length, start);
    }
    starts_ = std::move(starts);
  }
  text_ = std::move(text);
}

void Text::assign(std::string text) {
  check_length(text.size());
  text_ = std::move(text);
}

void Text::prepend(std::string_view text) {
  if (text_.empty()) return;
  check_length(text_.size() + text.size());
  text_.insert(0, text);
  if (tracked_) starts_.insert(starts_.begin(), text.size(), char{starts_[0]});
}

void Text::replace(const std::vector<Match>& matches, std::string_view content) {
  std::string text;
  text.reserve(text_.size());
  std::vector<char> starts;
  for (const Match& match : matches) {
    if (match.matched) {
      check_length(text.size() + content.size());
      text.append(content);
      if (tracked_)
        starts.insert(starts.end(), content.size(),
                      match.end == 0 ? static_cast<char>(at_start_) : starts_[match.end - 1]);
    } else {
      text.append(text_, match.begin, match.end - match.begin);
      if (tracked_)
        starts.insert(starts.end(), starts_.begin() + static_cast<std::ptrdiff_t>(match.begin),
                      starts_.begin() + static_cast<std::ptrdiff_t>(match.end));
    }
  }
  text_ = std::move(text);
  starts_ = std::move(starts);
}

Text Text::slice(std::size_t begin, std::size_t end) const {
  Text part;
  part.text_ = text_.substr(begin, end - begin);
  part.tracked_ = tracked_;
  if (tracked_) {
    part.starts_.assign(starts_.begin() + static_cast<std::ptrdiff_t>(begin),
                        starts_.begin() + static_cast<std::ptrdiff_t>(end));
    if (begin < end) part.at_start_ = starts_[begin] != 0;
  }
  return part;
}

void split_at(const Text& text, std::vector<Match> matches, Behavior behavior, Pieces& into) {
  std::vector<Match> kept;
  const auto merge = [&](auto joins, auto extend) {
    bool previous = false;
    for (const Match& match : matches) {
      if (joins(match.matched, previous) && !kept.empty())
        extend(kept.back(), match);
      else
        kept.push_back(match);
      previous = match.matched;
    }
  };
  const auto extend_end = [](Match& last, const Match& match) { last.end = match.end; };
  const auto first_delimiter = [](bool matched, bool previous) { return matched && !previous; };
  switch (behavior) {
    case Behavior::removed:
      for (const Match& match : matches)
        if (!match.matched) kept.push_back(match);
      break;
    case Behavior::isolated:
      kept = std::move(matches);
      break;
    case Behavior::contiguous:
      merge([](bool matched, bool previous) { return matched == previous; }, extend_end);
      break;
    case Behavior::merged_with_previous:
      merge(first_delimiter, extend_end);
      break;
    case Behavior::merged_with_next:
      std::reverse(matches.begin(), matches.end());
      merge(first_delimiter, [](Match& last, const Match& match) { last.begin = match.begin; });
      std::reverse(kept.begin(), kept.end());
      break;
  }
  for (const Match& part : kept)
    if (part.begin < part.end) into.push_back({text.slice(part.begin, part.end), std::nullopt});
}

}  // namespace llm2slm::detail::tokenizing
