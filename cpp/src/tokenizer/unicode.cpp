#include "unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstddef>
#include <iterator>
#include <string>

#include "code_points.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

struct Range {
  char32_t first, last;
};
struct Composition {
  char32_t first, second, composed;
};
struct Lower {
  char32_t first, last, step;
  std::int32_t add;
};

#include "unicode_tables.inc"

template <std::size_t size>
bool holds(const Range (&table)[size], char32_t point) {
  const Range* found = std::upper_bound(std::begin(table), std::end(table), point,
                                        [](char32_t sought, const Range& range) { return sought < range.first; });
  return found != std::begin(table) && point <= std::prev(found)->last;
}

/// The value of a code point in a table of `first code point << 8 | value`, which begins with code point 0.
template <std::size_t size>
std::uint8_t value_of(const std::uint32_t (&table)[size], char32_t point) {
  const std::uint32_t* found =
      std::upper_bound(std::begin(table), std::end(table), (static_cast<std::uint32_t>(point) << 8) | 0xFF);
  return static_cast<std::uint8_t>(*std::prev(found) & 0xFF);
}

template <std::size_t size>
Ranges ranges_of(const Range (&table)[size]) {
  Ranges ranges;
  for (const Range& range : table) ranges.emplace_back(range.first, range.last);
  return ranges;
}

// In the order of tools/unicode_tables.py.
constexpr std::array<std::string_view, 30> kCategoryNames = {
    "cn", "lu", "ll", "lt", "lm", "lo", "mn", "mc", "me", "nd", "nl", "no", "pc", "pd", "ps",
    "pe", "pi", "pf", "po", "sm", "sc", "sk", "so", "zs", "zl", "zp", "cc", "cf", "cs", "co"};

enum Break : std::uint8_t {
  kOther,
  kCR,
  kLF,
  kControl,
  kExtend,
  kConjunctExtend,
  kConjunctLinker,
  kZWJ,
  kRegionalIndicator,
  kPrepend,
  kSpacingMark,
  kL,
  kV,
  kT,
  kLV,
  kLVT,
  kConjunctConsonant,
  kPictographic
};

bool is_extend(std::uint8_t property) {
  return property == kExtend || property == kConjunctExtend || property == kConjunctLinker;
}

constexpr char32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11A7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28,
                   kSyllableCount = kLeadCount * kVowelCount * kTailCount;

}  // namespace

bool is_space(char32_t point) {
  return point < 0x80 ? point == ' ' || (point >= 9 && point <= 13) : holds(kSpace, point);
}
bool is_word(char32_t point) { return holds(kWord, point); }
bool is_numeric(char32_t point) { return point < 0x80 ? point >= '0' && point <= '9' : holds(kNumeric, point); }
bool is_punctuation(char32_t point) { return holds(kPunctuation, point); }
bool is_unclean(char32_t point) { return holds(kUnclean, point); }
bool is_nonspacing(char32_t point) { return point >= 0x300 && holds(kNonspacing, point); }
bool is_mark(char32_t point) { return point >= 0x300 && holds(kMark, point); }

char32_t lower(char32_t point) {
  if (point < 0x80) return point >= 'A' && point <= 'Z' ? point + 32 : point;
  const Lower* found = std::upper_bound(std::begin(kLower), std::end(kLower), point,
                                        [](char32_t sought, const Lower& entry) { return sought < entry.first; });
  if (found == std::begin(kLower)) return point;
  --found;
  if (point > found->last || (point - found->first) % found->step != 0) return point;
  return static_cast<char32_t>(static_cast<std::int64_t>(point) + found->add);
}

std::uint8_t combining_class(char32_t point) { return point < 0x300 ? std::uint8_t{0} : value_of(kCombining, point); }

void decompose(char32_t point, bool compatible, std::vector<char32_t>& into) {
  if (point >= kSyllables && point < kSyllables + kSyllableCount) {
    const char32_t index = point - kSyllables;
    into.push_back(kLeads + index / (kVowelCount * kTailCount));
    into.push_back(kVowels + index % (kVowelCount * kTailCount) / kTailCount);
    if (index % kTailCount != 0) into.push_back(kTails + index % kTailCount);
    return;
  }
  // utf8proc may know code points that the library does not: what decomposes is the library's, into what is the same.
  if (point < 0x80 || !(compatible ? holds(kCompatible, point) : holds(kCanonical, point))) {
    into.push_back(point);
    return;
  }
  std::array<utf8proc_int32_t, 32> parts{};
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0));
  const utf8proc_ssize_t count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(point), parts.data(),
                                                         static_cast<utf8proc_ssize_t>(parts.size()), options, nullptr);
  if (count <= 0 || static_cast<std::size_t>(count) > parts.size()) {
    into.push_back(point);
    return;
  }
  for (utf8proc_ssize_t i = 0; i < count; ++i)
    into.push_back(static_cast<char32_t>(parts[static_cast<std::size_t>(i)]));
}

char32_t compose(char32_t first, char32_t second) {
  if (first >= kLeads && first < kLeads + kLeadCount && second >= kVowels && second < kVowels + kVowelCount)
    return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kTailCount;
  if (first >= kSyllables && first < kSyllables + kSyllableCount && (first - kSyllables) % kTailCount == 0 &&
      second > kTails && second < kTails + kTailCount)
    return first + (second - kTails);
  if (second < 0x300) return 0;
  const auto before = [](const Composition& entry, const std::pair<char32_t, char32_t>& sought) {
    return std::make_pair(entry.first, entry.second) < sought;
  };
  const Composition* found =
      std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::make_pair(first, second), before);
  return found != std::end(kCompositions) && found->first == first && found->second == second ? found->composed : 0;
}

std::size_t end_of_cluster(std::string_view text, std::size_t offset) {
  const auto property_at = [&](std::size_t at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    if (byte >= 0x20 && byte < 0x7F) return static_cast<std::uint8_t>(kOther);
    return value_of(kBreaks, code_point_at(text, at));
  };
  std::uint8_t before = property_at(offset);
  bool odd_indicators = before == kRegionalIndicator;
  // An Extended_Pictographic, then any number of Extend; the same and a ZWJ.
  bool pictographic = before == kPictographic, pictographic_joined = false;
  // A Consonant, then Extend and Linker of its conjunct, and whether a Linker was among them.
  bool consonant = before == kConjunctConsonant, linked = false;
  for (std::size_t end = offset + length_of(text[offset]);; end += length_of(text[end])) {
    if (end >= text.size()) return text.size();
    const std::uint8_t after = property_at(end);
    bool joined = false;
    if (before == kCR && after == kLF) {
      joined = true;
    } else if (before == kCR || before == kLF || before == kControl || after == kCR || after == kLF ||
               after == kControl) {
      joined = false;
    } else if (before == kL && (after == kL || after == kV || after == kLV || after == kLVT)) {
      joined = true;
    } else if ((before == kLV || before == kV) && (after == kV || after == kT)) {
      joined = true;
    } else if ((before == kLVT || before == kT) && after == kT) {
      joined = true;
    } else if (is_extend(after) || after == kZWJ || after == kSpacingMark || before == kPrepend) {
      joined = true;
    } else if (consonant && linked && after == kConjunctConsonant) {
      joined = true;
    } else if (pictographic_joined && after == kPictographic) {
      joined = true;
    } else if (odd_indicators && after == kRegionalIndicator) {
      joined = true;
    }
    if (!joined) return end;
    pictographic_joined = pictographic && after == kZWJ;
    pictographic = after == kPictographic || (pictographic && is_extend(after));
    if (after == kConjunctConsonant) {
      consonant = true;
      linked = false;
    } else if (after == kConjunctLinker) {
      linked = consonant;
    } else if (after != kConjunctExtend && after != kZWJ) {
      consonant = linked = false;
    }
    odd_indicators = after == kRegionalIndicator && !odd_indicators;
    before = after;
  }
}

Ranges property(std::string_view name) {
  std::string small;
  for (const char letter : name)
    if (letter != ' ' && letter != '_' && letter != '-')
      small.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(letter))));
  if (small == "han") return ranges_of(kScriptHan);
  if (small == "hiragana") return ranges_of(kScriptHiragana);
  if (small == "katakana") return ranges_of(kScriptKatakana);
  if (small == "hangul") return ranges_of(kScriptHangul);
  if (small == "latin") return ranges_of(kScriptLatin);
  if (small == "greek") return ranges_of(kScriptGreek);
  if (small == "cyrillic") return ranges_of(kScriptCyrillic);
  if (small == "arabic") return ranges_of(kScriptArabic);
  if (small == "hebrew") return ranges_of(kScriptHebrew);
  if (small == "thai") return ranges_of(kScriptThai);
  if (small == "devanagari") return ranges_of(kScriptDevanagari);
  if (small.empty() || small.size() > 2) return {};
  Ranges ranges;
  for (std::size_t i = 0; i < std::size(kCategories); ++i) {
    const std::string_view category = kCategoryNames[kCategories[i] & 0xFF];
    if (category.substr(0, small.size()) != small) continue;
    const char32_t first = kCategories[i] >> 8;
    const char32_t last = i + 1 < std::size(kCategories) ? (kCategories[i + 1] >> 8) - 1 : 0x10FFFF;
    if (!ranges.empty() && ranges.back().second + 1 == first)
      ranges.back().second = last;
    else
      ranges.emplace_back(first, last);
  }
  return ranges;
}

Ranges pattern_word() { return ranges_of(kPatternWord); }
Ranges pattern_space() { return ranges_of(kPatternSpace); }

}  // namespace llm2slm::detail::tokenizing
