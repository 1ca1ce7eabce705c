#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../error.hpp"
#include "../utf8.hpp"
#include "code_points.hpp"
#include "normalizer.hpp"
#include "unicode.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

/// Bytes of base64 with padding; nothing where it is none.
std::optional<std::string> decoded_base64(std::string_view text) {
  if (text.size() % 4 != 0) return std::nullopt;
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  for (std::size_t i = 0; i < text.size(); i += 4) {
    std::uint32_t group = 0;
    std::size_t padding = 0;
    for (std::size_t j = 0; j < 4; ++j) {
      const char c = text[i + j];
      std::uint32_t value = 0;
      if (c >= 'A' && c <= 'Z') {
        value = static_cast<std::uint32_t>(c - 'A');
      } else if (c >= 'a' && c <= 'z') {
        value = static_cast<std::uint32_t>(c - 'a' + 26);
      } else if (c >= '0' && c <= '9') {
        value = static_cast<std::uint32_t>(c - '0' + 52);
      } else if (c == '+') {
        value = 62;
      } else if (c == '/') {
        value = 63;
      } else if (c == '=' && i + 4 == text.size() && j >= 2) {
        ++padding;
      } else {
        return std::nullopt;
      }
      if (padding > 0 && c != '=') return std::nullopt;
      group = group << 6 | value;
    }
    for (std::size_t j = 0; j < 3 - padding; ++j) bytes.push_back(static_cast<char>(group >> (16 - 8 * j) & 0xFF));
    if (padding > 0 && (group & ((1U << (8 * padding)) - 1)) != 0) return std::nullopt;
  }
  return bytes;
}

/// Begins with the size of a double-array trie in bytes and the trie, of units of 32 bits; the values in it are offsets
/// into the text that follows, where a replacement ends with a NUL.
class Precompiled : public Normalizer {
 public:
  explicit Precompiled(const Part& part) {
    const std::optional<std::string> bytes = decoded_base64(part.at("precompiled_charsmap").text());
    if (!bytes) throw part.refused("precompiled_charsmap is not base64");
    const auto word = [&](std::size_t at) {
      std::uint32_t value = 0;
      for (std::size_t i = 0; i < 4; ++i)
        value |= static_cast<std::uint32_t>(static_cast<unsigned char>((*bytes)[at + i])) << (8 * i);
      return value;
    };
    if (bytes->size() < 4) throw part.refused("precompiled_charsmap is too short");
    const std::size_t count = word(0) / 4;
    if (count == 0 || count > (bytes->size() - 4) / 4)
      throw part.refused("the trie of precompiled_charsmap is not in it");
    units_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) units_.push_back(word(4 + 4 * i));
    replacements_ = bytes->substr(4 + 4 * count);
    if (invalid_utf8(replacements_)) throw part.refused("the text of precompiled_charsmap is not UTF-8");
  }

  void normalize(Text& text) const override {
    const std::string& old = text.str();
    std::string plain;
    std::vector<Change> changes;
    if (text.tracked())
      changes.reserve(old.size());
    else
      plain.reserve(old.size() + old.size() / 8);
    bool modified = false;
    const auto keep = [&](std::string_view part) {
      if (text.tracked())
        changes.push_back({code_point_at(part, 0), 0});
      else
        plain.append(part);
    };
    const auto put = [&](std::string_view part, std::string_view replacement) {
      modified = true;
      if (text.tracked())
        replace(changes, part, replacement);
      else
        plain.append(replacement);
    };
    for (std::size_t begin = 0; begin < old.size();) {
      const std::size_t end = end_of_cluster(old, begin);
      const std::string_view cluster = std::string_view(old).substr(begin, end - begin);
      begin = end;
      if (cluster.size() < 6) {
        if (const auto replacement = replacement_of(cluster)) {
          put(cluster, *replacement);
          continue;
        }
      }
      for_each_code_point(cluster, [&](char32_t, std::size_t offset, std::size_t length) {
        const std::string_view part = cluster.substr(offset, length);
        if (const auto replacement = replacement_of(part))
          put(part, *replacement);
        else
          keep(part);
      });
    }
    if (!modified) return;
    if (text.tracked())
      text.transform(changes, 0);
    else
      text.assign(std::move(plain));
  }

 private:
  std::uint32_t unit(std::size_t at) const {
    if (at >= units_.size()) throw outside();
    return units_[at];
  }
  static Error outside() {
    return failure(ErrorCode::bundle, "The precompiled_charsmap of the tokenizer points outside itself", {},
                   "The file is damaged: build the bundle again.");
  }
  static std::size_t offset_of(std::uint32_t unit) {
    return static_cast<std::size_t>(unit >> 10) << ((unit & (1U << 9)) >> 6);
  }

  /// What the shortest entry that a text begins with is replaced by.
  std::optional<std::string_view> replacement_of(std::string_view text) const {
    std::size_t node = offset_of(unit(0));
    for (const char byte : text) {
      const auto label = static_cast<unsigned char>(byte);
      if (label == 0) return std::nullopt;
      node ^= label;
      const std::uint32_t found = unit(node);
      if ((found & (1U << 31 | 0xFF)) != label) return std::nullopt;
      node ^= offset_of(found);
      if ((found >> 8 & 1) != 0) {
        const std::size_t begin = unit(node) & 0x7FFFFFFF;
        if (begin > replacements_.size() || (begin < replacements_.size() && continues(replacements_[begin])))
          throw outside();
        const std::size_t end = replacements_.find('\0', begin);
        return std::string_view(replacements_).substr(begin, end == std::string::npos ? end : end - begin);
      }
    }
    return std::nullopt;
  }

  static void replace(std::vector<Change>& changes, std::string_view part, std::string_view replacement) {
    const auto count_of = [](std::string_view text) { return static_cast<std::ptrdiff_t>(count_code_points(text)); };
    std::ptrdiff_t more = count_of(replacement) - count_of(part);
    for_each_code_point(replacement, [&](char32_t point, std::size_t, std::size_t) { changes.push_back({point, 0}); });
    if (more < 0 && !changes.empty()) changes.back().change += static_cast<int>(more);
    for (std::size_t i = changes.size(); more > 0; --more) changes[--i].change = 1;
  }

  std::vector<std::uint32_t> units_;
  std::string replacements_;
};

}  // namespace

std::unique_ptr<Normalizer> read_precompiled(const Part& part) { return std::make_unique<Precompiled>(part); }

}  // namespace llm2slm::detail::tokenizing
