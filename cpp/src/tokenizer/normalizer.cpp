#include "normalizer.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "byte_alphabet.hpp"
#include "code_points.hpp"
#include "pattern.hpp"
#include "unicode.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

/// Keep the code points for which `keep` holds, each changed by `map`.
template <typename Keep, typename Map>
void filter(Text& text, Keep keep, Map map) {
  std::vector<Change> changes;
  changes.reserve(text.str().size());
  std::size_t initial = 0;
  for_each_code_point(text.str(), [&](char32_t point, std::size_t, std::size_t) {
    if (keep(point))
      changes.push_back({map(point), 0});
    else if (changes.empty())
      ++initial;
    else
      --changes.back().change;
  });
  // A text of which nothing is kept is replaced whole.
  text.transform(changes, changes.empty() ? 0 : initial);
}

char32_t same(char32_t point) { return point; }

void lowercase(Text& text) {
  std::vector<Change> changes;
  changes.reserve(text.str().size());
  for_each_code_point(text.str(), [&](char32_t point, std::size_t, std::size_t) {
    if (point == 0x130) {
      changes.push_back({'i', 0});
      changes.push_back({0x307, 1});
    } else {
      changes.push_back({lower(point), 0});
    }
  });
  text.transform(changes, 0);
}

class Sequence : public Normalizer {
 public:
  explicit Sequence(const Part& part) {
    const Part parts = part.at("normalizers");
    for (std::size_t i = 0; i < parts.size(); ++i) normalizers_.push_back(read(parts.at(i)));
  }
  void normalize(Text& text) const override {
    for (const auto& normalizer : normalizers_) normalizer->normalize(text);
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> normalizers_;
};

class Lowercase : public Normalizer {
 public:
  void normalize(Text& text) const override { lowercase(text); }
};

class Strip : public Normalizer {
 public:
  explicit Strip(const Part& part) : left_(part.at("strip_left").flag()), right_(part.at("strip_right").flag()) {}

  void normalize(Text& text) const override {
    std::size_t begin = 0, end = text.str().size();
    std::size_t leading = 0;
    if (left_) {
      while (begin < end && is_space(code_point_at(text.str(), begin))) {
        begin += length_of(text.str()[begin]);
        ++leading;
      }
    }
    if (right_) {
      while (end > begin) {
        std::size_t last = end - 1;
        while (continues(text.str()[last])) --last;
        if (!is_space(code_point_at(text.str(), last))) break;
        end = last;
      }
    }
    if (begin == 0 && end == text.str().size()) return;
    std::vector<Change> changes;
    for_each_code_point(std::string_view(text.str()).substr(begin, end - begin),
                        [&](char32_t point, std::size_t, std::size_t) {
                          changes.push_back({point, 0});
                        });
    text.transform(changes, leading);
  }

 private:
  bool left_, right_;
};

class StripAccents : public Normalizer {
 public:
  void normalize(Text& text) const override {
    filter(
        text, [](char32_t point) { return !is_mark(point); }, same);
  }
};

class Nmt : public Normalizer {
 public:
  void normalize(Text& text) const override { filter(text, keeps, map); }

 private:
  static bool keeps(char32_t point) {
    return !((point >= 0x1 && point <= 0x8) || point == 0xB || (point >= 0xE && point <= 0x1F) || point == 0x7F ||
             point == 0x8F || point == 0x9F);
  }
  static char32_t map(char32_t point) {
    const bool space = point == 0x9 || point == 0xA || point == 0xC || point == 0xD || point == 0x1680 ||
                       (point >= 0x200B && point <= 0x200F) || point == 0x2028 || point == 0x2029 || point == 0x2581 ||
                       point == 0xFEFF || point == 0xFFFD;
    return space ? U' ' : point;
  }
};

class Replace : public Normalizer {
 public:
  explicit Replace(const Part& part)
      : pattern_(Pattern::read(part.at("pattern"))), content_(part.at("content").text()) {
    // The library loses track of what it puts at the very beginning.
    if (pattern_.may_be_empty()) throw part.refused("its pattern may match where there is no text");
  }
  void normalize(Text& text) const override { text.replace(pattern_.matches(text.str()), content_); }

 private:
  Pattern pattern_;
  std::string content_;
};

class Prepend : public Normalizer {
 public:
  explicit Prepend(const Part& part) : text_(part.at("prepend").text()) {
    if (text_.empty()) throw part.refused("it prepends nothing");
  }
  void normalize(Text& text) const override { text.prepend(text_); }

 private:
  std::string text_;
};

class ByteLevel : public Normalizer {
 public:
  void normalize(Text& text) const override {
    std::vector<Change> changes;
    changes.reserve(text.str().size());
    for (const char byte : text.str())
      changes.push_back({kByteAlphabet[static_cast<unsigned char>(byte)], continues(byte) ? 1 : 0});
    text.transform(changes, 0);
  }
};

bool is_chinese(char32_t point) {
  return (point >= 0x4E00 && point <= 0x9FFF) || (point >= 0x3400 && point <= 0x4DBF) ||
         (point >= 0x20000 && point <= 0x2A6DF) || (point >= 0x2A700 && point <= 0x2B73F) ||
         (point >= 0x2B740 && point <= 0x2B81F) || (point >= 0x2B920 && point <= 0x2CEAF) ||
         (point >= 0xF900 && point <= 0xFAFF) || (point >= 0x2F800 && point <= 0x2FA1F);
}

class Bert : public Normalizer {
 public:
  explicit Bert(const Part& part)
      : clean_(part.at("clean_text").flag()),
        chinese_(part.at("handle_chinese_chars").flag()),
        lowercase_(part.at("lowercase").flag()),
        strip_accents_(part.flag_or("strip_accents", lowercase_)) {}

  void normalize(Text& text) const override {
    if (clean_)
      filter(
          text, [](char32_t point) { return !is_unclean(point); },
          [](char32_t point) { return is_space(point) ? U' ' : point; });
    if (chinese_) {
      std::vector<Change> changes;
      changes.reserve(text.str().size());
      for_each_code_point(text.str(), [&](char32_t point, std::size_t, std::size_t) {
        if (is_chinese(point)) {
          changes.push_back({' ', 0});
          changes.push_back({point, 1});
          changes.push_back({' ', 1});
        } else {
          changes.push_back({point, 0});
        }
      });
      text.transform(changes, 0);
    }
    if (strip_accents_) {
      Form(false, false).normalize(text);
      filter(
          text, [](char32_t point) { return !is_nonspacing(point); }, same);
    }
    if (lowercase_) lowercase(text);
  }

 private:
  bool clean_, chinese_, lowercase_, strip_accents_;
};

}  // namespace

void Form::normalize(Text& text) const {
  if (is_ascii(text.str())) return;
  struct Mark {
    char32_t point;
    int change;
    std::uint8_t combining;
  };
  std::vector<Mark> marks;
  marks.reserve(text.str().size());
  std::vector<char32_t> parts;
  for_each_code_point(text.str(), [&](char32_t point, std::size_t, std::size_t) {
    parts.clear();
    decompose(point, compatible_, parts);
    for (std::size_t i = 0; i < parts.size(); ++i)
      marks.push_back({parts[i], i == 0 ? 0 : 1, combining_class(parts[i])});
  });
  // Marks between two starters go in the order of their classes.
  for (std::size_t begin = 0; begin < marks.size();) {
    if (marks[begin].combining == 0) {
      ++begin;
      continue;
    }
    std::size_t end = begin;
    while (end < marks.size() && marks[end].combining != 0) ++end;
    std::stable_sort(marks.begin() + static_cast<std::ptrdiff_t>(begin),
                     marks.begin() + static_cast<std::ptrdiff_t>(end),
                     [](const Mark& a, const Mark& b) { return a.combining < b.combining; });
    begin = end;
  }
  std::vector<Change> changes;
  changes.reserve(marks.size());
  if (!composed_) {
    for (const Mark& mark : marks) changes.push_back({mark.point, mark.change});
    text.transform(changes, 0);
    return;
  }
  // The starter that what follows may compose with, by its index, and the class of the last mark that did not.
  std::optional<std::size_t> starter;
  std::optional<std::uint8_t> last;
  for (const Mark& mark : marks) {
    if (!starter) {
      if (mark.combining == 0) starter = changes.size();
      changes.push_back({mark.point, mark.change});
      continue;
    }
    const bool blocked = last && *last >= mark.combining;
    if (!blocked) {
      if (const char32_t composed = compose(changes[*starter].point, mark.point); composed != 0) {
        changes[*starter].point = composed;
        changes[*starter].change += mark.change - 1;
        continue;
      }
    }
    if (mark.combining == 0) {
      starter = changes.size();
      last.reset();
    } else {
      last = mark.combining;
    }
    changes.push_back({mark.point, mark.change});
  }
  text.transform(changes, 0);
}

std::unique_ptr<Normalizer> Normalizer::read(const Part& part) {
  const std::string type = part.type();
  if (type == "Sequence") return std::make_unique<Sequence>(part);
  if (type == "Precompiled") return read_precompiled(part);
  if (type == "NFC") return std::make_unique<Form>(true, false);
  if (type == "NFD") return std::make_unique<Form>(false, false);
  if (type == "NFKC") return std::make_unique<Form>(true, true);
  if (type == "NFKD") return std::make_unique<Form>(false, true);
  if (type == "Lowercase") return std::make_unique<Lowercase>();
  if (type == "Strip") return std::make_unique<Strip>(part);
  if (type == "StripAccents") return std::make_unique<StripAccents>();
  if (type == "Nmt") return std::make_unique<Nmt>();
  if (type == "Replace") return std::make_unique<Replace>(part);
  if (type == "Prepend") return std::make_unique<Prepend>(part);
  if (type == "ByteLevel") return std::make_unique<ByteLevel>();
  if (type == "BertNormalizer") return std::make_unique<Bert>(part);
  throw part.unknown_type("normalizer");
}

}  // namespace llm2slm::detail::tokenizing
