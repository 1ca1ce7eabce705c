#include "expression.hpp"

#include <algorithm>
#include <map>
#include <optional>

#include "code_points.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

constexpr char32_t kLast = 0x10FFFF;
constexpr int kDeepest = 50;
constexpr std::size_t kLongest = 20000, kMostSets = 512;

/// Sorted, without overlaps.
Ranges sorted(Ranges ranges) {
  std::sort(ranges.begin(), ranges.end());
  Ranges result;
  for (const auto& range : ranges) {
    if (!result.empty() && range.first <= result.back().second + 1)
      result.back().second = std::max(result.back().second, range.second);
    else
      result.push_back(range);
  }
  return result;
}

Ranges inverted(const Ranges& ranges) {
  Ranges result;
  char32_t next = 0;
  for (const auto& range : sorted(ranges)) {
    if (next < range.first) result.emplace_back(next, range.first - 1);
    next = range.second + 1;
  }
  if (next <= kLast) result.emplace_back(next, kLast);
  return result;
}

void add(Ranges& ranges, const Ranges& more) { ranges.insert(ranges.end(), more.begin(), more.end()); }

class Parser {
 public:
  Parser(std::string_view text, const Part& where) : text_(text), where_(where) {}

  Expression parse() {
    if (text_.size() > kLongest) throw refused("it is too long");
    bool insensitive = false;
    // Further on, Ruby's (?i) also takes in the alternatives that follow.
    if (take("(?i)")) insensitive = true;
    alternatives(insensitive, 0);
    if (!done()) throw refused("unmatched )");
    return std::move(result_);
  }

 private:
  enum class Kind { character, group, assertion };

  bool done() const { return at_ >= text_.size(); }
  bool sees(std::string_view token) const { return text_.substr(at_, token.size()) == token; }
  bool take(std::string_view token) {
    if (!sees(token)) return false;
    at_ += token.size();
    return true;
  }
  char32_t next() {
    if (done()) throw refused("it ends too early");
    const char32_t point = code_point_at(text_, at_);
    at_ += length_of(text_[at_]);
    return point;
  }
  Error refused(const std::string& why) const {
    return where_.refused("the regular expression " + std::string(text_.substr(0, 200)) + " is not supported: " + why +
                          ", at byte " + std::to_string(at_));
  }

  void syntax(const std::string& text) {
    if (!result_.parts.empty() && std::holds_alternative<std::string>(result_.parts.back()))
      std::get<std::string>(result_.parts.back()) += text;
    else
      result_.parts.emplace_back(text);
  }
  void set(Ranges ranges) {
    // The same set is kept once: patterns repeat their characters.
    const auto [found, added] = numbers_.emplace(sorted(std::move(ranges)), result_.sets.size());
    if (added) result_.sets.push_back(found->first);
    if (numbers_.size() > kMostSets) throw refused("it has too many classes of characters");
    result_.parts.emplace_back(found->second);
  }

  void alternatives(bool insensitive, int depth) {
    if (depth > kDeepest) throw refused("its groups are nested too deep");
    sequence(insensitive, depth);
    while (take("|")) {
      syntax("|");
      sequence(insensitive, depth);
    }
  }

  void sequence(bool insensitive, int depth) {
    previous_ = 0;
    while (!done() && !sees("|") && !sees(")")) {
      const Kind kind = item(insensitive, depth);
      const char32_t character = kind == Kind::character ? literal_ : 0;
      const bool repeated = quantifier(kind, insensitive && (character == 's' || character == 'f'));
      // Case-insensitively, Oniguruma takes some pairs of letters for one character, such as ss for ß.
      if (insensitive && previous_ != 0 && character != 0) check_pair(previous_, character);
      previous_ = repeated ? 0 : character;
    }
  }

  void check_pair(char32_t first, char32_t second) const {
    const bool folds = (first == 's' && (second == 's' || second == 't')) ||
                       (first == 'f' && (second == 'f' || second == 'i' || second == 'l'));
    if (folds) throw refused("case-insensitive letters that may be one character");
  }

  Kind item(bool insensitive, int depth) {
    literal_ = 0;
    if (take("(")) return group(insensitive, depth);
    if (take("[")) {
      set(bracket(insensitive, 0));
      return Kind::character;
    }
    if (take(".")) {
      set(inverted({{'\n', '\n'}}));
      return Kind::character;
    }
    if (take("^")) {
      syntax("(?:\\A|(?<=");
      set({{'\n', '\n'}});
      syntax(")(?!\\z))");
      return Kind::assertion;
    }
    if (take("$")) {
      syntax("(?:(?<!");
      set({{'\n', '\n'}});
      syntax(")\\z|(?=");
      set({{'\n', '\n'}});
      syntax("))");
      return Kind::assertion;
    }
    if (sees("*") || sees("+") || sees("?")) throw refused("nothing to repeat");
    if (take("\\")) return escape(insensitive);
    character(next(), insensitive);
    return Kind::character;
  }

  Kind group(bool insensitive, int depth) {
    Kind kind = Kind::group;
    const char* opening = "(?:";
    if (take("?")) {
      if (take("=")) {
        opening = "(?=";
        kind = Kind::assertion;
      } else if (take("!")) {
        opening = "(?!";
        kind = Kind::assertion;
      } else if (take("<=")) {
        opening = "(?<=";
        kind = Kind::assertion;
      } else if (take("<!")) {
        opening = "(?<!";
        kind = Kind::assertion;
      } else if (take(">")) {
        opening = "(?>";
      } else if (take("i:")) {
        insensitive = true;
      } else if (take("-i:")) {
        insensitive = false;
      } else if (!take(":")) {
        throw refused("this kind of group");
      }
    }
    syntax(opening);
    alternatives(insensitive, depth + 1);
    if (!take(")")) throw refused("a group without )");
    syntax(")");
    literal_ = 0;
    return kind;
  }

  /// Whether there was one.
  bool quantifier(Kind kind, bool folds) {
    std::string text;
    if (take("*")) {
      text = "*";
    } else if (take("+")) {
      text = "+";
    } else if (take("?")) {
      text = "?";
    } else if (sees("{")) {
      text = interval();
    }
    if (text.empty()) return false;
    if (kind == Kind::assertion) throw refused("an assertion that is repeated");
    if (folds) throw refused("case-insensitive letters that may be one character");
    const bool is_interval = text.front() == '{';
    if (sees("?")) {
      // {n}? is lazy elsewhere; in Ruby it makes the whole optional.
      if (is_interval && text.find(',') == std::string::npos) throw refused("{n}?");
      take("?");
      text += '?';
    } else if (sees("+")) {
      if (is_interval) throw refused("an interval with +");
      take("+");
      text += '+';
    }
    if (sees("*") || sees("+") || sees("?") || !interval_here().empty()) throw refused("two quantifiers");
    syntax(text);
    return true;
  }

  /// The interval at this place as PCRE2 writes it; empty where it is no interval, and { is a character then.
  std::string interval_here() const {
    if (!sees("{")) return {};
    const std::size_t end = text_.find('}', at_);
    if (end == std::string_view::npos || end - at_ > 12) return {};
    const std::string inside(text_.substr(at_ + 1, end - at_ - 1));
    const std::size_t comma = inside.find(',');
    const std::string low = inside.substr(0, comma);
    const std::string high = comma == std::string::npos ? "" : inside.substr(comma + 1);
    const auto digits = [](const std::string& number) {
      return std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; });
    };
    if (!digits(low) || !digits(high) || (low.empty() && high.empty())) return {};
    if (comma == std::string::npos) return "{" + low + "}";
    return "{" + (low.empty() ? "0" : low) + "," + high + "}";
  }
  std::string interval() {
    const std::string found = interval_here();
    if (!found.empty()) at_ = text_.find('}', at_) + 1;
    return found;
  }

  Kind escape(bool insensitive) {
    if (done()) throw refused("it ends with \\");
    const auto assertion = [&](const char* text) {
      syntax(text);
      return Kind::assertion;
    };
    if (take("A")) return assertion("\\A");
    if (take("z")) return assertion("\\z");
    if (take("Z")) {
      syntax("(?=");
      set({{'\n', '\n'}});
      return assertion("?\\z)");
    }
    if (take("b")) {
      boundary("(?:(?<=", ")(?!", ")|(?<!", ")(?=", "))");
      return Kind::assertion;
    }
    if (take("B")) {
      boundary("(?:(?<=", ")(?=", ")|(?<!", ")(?!", "))");
      return Kind::assertion;
    }
    if (const std::optional<Ranges> ranges = shorthand(insensitive)) {
      set(*ranges);
      return Kind::character;
    }
    character(escaped(), insensitive);
    return Kind::character;
  }

  void boundary(const char* a, const char* b, const char* c, const char* d, const char* e) {
    for (const char* text : {a, b, c, d}) {
      syntax(text);
      set(pattern_word());
    }
    syntax(e);
  }

  /// \s, \p{…} and their like behind the \.
  std::optional<Ranges> shorthand(bool insensitive) {
    if (take("s")) return pattern_space();
    if (take("S")) return inverted(pattern_space());
    if (take("d")) return property("Nd");
    if (take("D")) return inverted(property("Nd"));
    if (take("h")) return Ranges{{'0', '9'}, {'A', 'F'}, {'a', 'f'}};
    if (take("H")) return inverted({{'0', '9'}, {'A', 'F'}, {'a', 'f'}});
    if (sees("w") || sees("W") || sees("p{") || sees("P{")) {
      // Which case variants a property has is the library's secret.
      if (insensitive) throw refused("a property that is case-insensitive");
      if (take("w")) return pattern_word();
      if (take("W")) return inverted(pattern_word());
      bool negated = sees("P");
      at_ += 2;
      if (take("^")) negated = !negated;
      const std::size_t end = text_.find('}', at_);
      if (end == std::string_view::npos) throw refused("a property without }");
      const std::string_view name = text_.substr(at_, end - at_);
      const Ranges ranges = property(name);
      if (ranges.empty()) throw refused("the property " + std::string(name));
      at_ = end + 1;
      return negated ? inverted(ranges) : ranges;
    }
    return std::nullopt;
  }

  /// The character of an escape behind the \.
  char32_t escaped() {
    const char32_t point = next();
    switch (point) {
      case 't':
        return '\t';
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 'f':
        return '\f';
      case 'v':
        return '\v';
      case 'a':
        return '\a';
      case 'e':
        return 0x1B;
      case 'u':
        return hexadecimal(4, 4);
      case 'x': {
        if (take("{")) {
          const char32_t value = hexadecimal(1, 8);
          if (!take("}")) throw refused("\\x{ without }");
          return value;
        }
        const char32_t value = hexadecimal(2, 2);
        // Two digits are a byte, and one that is not ASCII would be a part of a character.
        if (value >= 0x80) throw refused("\\x of a byte that is not ASCII");
        return value;
      }
      default:
        if (point < 0x80 &&
            ((point >= '0' && point <= '9') || (point >= 'a' && point <= 'z') || (point >= 'A' && point <= 'Z')))
          throw refused("this escape");
        return point;
    }
  }

  char32_t hexadecimal(std::size_t least, std::size_t most) {
    char32_t value = 0;
    std::size_t count = 0;
    for (; count < most && !done(); ++count, ++at_) {
      const char digit = text_[at_];
      if (digit >= '0' && digit <= '9')
        value = value * 16 + static_cast<char32_t>(digit - '0');
      else if (digit >= 'a' && digit <= 'f')
        value = value * 16 + static_cast<char32_t>(digit - 'a' + 10);
      else if (digit >= 'A' && digit <= 'F')
        value = value * 16 + static_cast<char32_t>(digit - 'A' + 10);
      else
        break;
    }
    if (count < least || value > kLast || (value >= 0xD800 && value <= 0xDFFF))
      throw refused("it has an invalid code point");
    return value;
  }

  void character(char32_t point, bool insensitive) {
    Ranges ranges = {{point, point}};
    set(insensitive ? either_case(ranges) : ranges);
    literal_ = point >= 'A' && point <= 'Z' ? point + 32 : point;
  }

  /// With the other case of every letter. Only of ASCII: further on, case is a matter of tables that differ.
  Ranges either_case(const Ranges& ranges) const {
    Ranges result = ranges;
    for (const auto& range : ranges) {
      if (range.second >= 0x80) throw refused("case-insensitive characters that are not ASCII");
      for (char32_t point = range.first; point <= range.second; ++point) {
        const char32_t small = point >= 'A' && point <= 'Z' ? point + 32 : point;
        if (small < 'a' || small > 'z') continue;
        add(result, {{small, small}, {small - 32, small - 32}});
        if (small == 's') add(result, {{0x17F, 0x17F}});
        if (small == 'k') add(result, {{0x212A, 0x212A}});
      }
    }
    return result;
  }

  /// A class behind its [.
  Ranges bracket(bool insensitive, int depth) {
    if (depth > kDeepest) throw refused("its classes are nested too deep");
    const bool negated = take("^");
    if (sees("]")) throw refused("a class that begins with ]");
    // Characters have variants in the other case; what shorthands stand for does not.
    Ranges characters, others;
    bool after_set = false;
    while (!take("]")) {
      if (done()) throw refused("a class without ]");
      if (sees("&&")) throw refused("&&");
      if (sees("[:")) throw refused("a POSIX bracket");
      if (take("[")) {
        add(others, bracket(insensitive, depth + 1));
        after_set = true;
        continue;
      }
      if (sees("-") && after_set && text_.substr(at_ + 1, 1) != "]") throw refused("a - that could be a range");
      char32_t first = 0;
      if (take("\\")) {
        if (done()) throw refused("it ends with \\");
        if (sees("b")) throw refused("\\b in a class");
        if (const std::optional<Ranges> ranges = shorthand(insensitive)) {
          add(others, *ranges);
          after_set = true;
          continue;
        }
        first = escaped();
      } else {
        first = next();
      }
      char32_t last = first;
      after_set = false;
      if (sees("-") && text_.substr(at_ + 1, 1) != "]") {
        take("-");
        if (sees("[")) throw refused("a range to a class");
        if (take("\\")) {
          if (shorthand(insensitive)) throw refused("a range to a class");
          last = escaped();
        } else {
          last = next();
        }
        if (last < first) throw refused("an empty range");
        after_set = true;
      }
      characters.emplace_back(first, last);
    }
    if (insensitive) characters = either_case(characters);
    add(characters, others);
    literal_ = 0;
    return negated ? inverted(characters) : sorted(characters);
  }

  std::string_view text_;
  const Part& where_;
  std::size_t at_ = 0;
  // The letter that the last item was, and the one before it; 0 where it was something else.
  char32_t literal_ = 0, previous_ = 0;
  Expression result_;
  std::map<Ranges, std::size_t> numbers_;
};

}  // namespace

Expression parse_expression(std::string_view expression, const Part& where) {
  return Parser(expression, where).parse();
}

}  // namespace llm2slm::detail::tokenizing
