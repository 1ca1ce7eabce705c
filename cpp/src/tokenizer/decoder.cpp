#include "decoder.hpp"

#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include "../error.hpp"
#include "../utf8.hpp"
#include "byte_alphabet.hpp"
#include "code_points.hpp"
#include "pattern.hpp"
#include "pre_tokenizer.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

void replace_all(std::string& text, std::string_view old, std::string_view by) {
  std::size_t at = text.find(old);
  if (at == std::string::npos) return;
  std::string result;
  std::size_t last = 0;
  for (; at != std::string::npos; at = text.find(old, last)) {
    result.append(text, last, at - last).append(by);
    last = at + old.size();
  }
  text = result.append(text, last);
}

/// Bytes as text, with U+FFFD for every longest run that begins a character but does not end it, and every other wrong
/// byte.
std::string lossy(std::string_view bytes) {
  std::string text;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::optional<std::size_t> wrong = invalid_utf8(bytes.substr(at));
    if (!wrong) return text.append(bytes.substr(at));
    text.append(bytes.substr(at, *wrong)).append(kReplacement);
    at += *wrong;
    const auto byte = [&](std::size_t i) {
      return at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0U;
    };
    const unsigned first = byte(0), second = byte(1);
    std::size_t length = 1;
    const unsigned least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    const unsigned most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (first >= 0xE0 && first <= 0xF4 && second >= least && second <= most) {
      length = 2;
      if (first >= 0xF0 && byte(2) >= 0x80 && byte(2) <= 0xBF) length = 3;
    }
    at += length;
  }
  return text;
}

class Sequence : public Decoder {
 public:
  explicit Sequence(const Part& part) {
    const Part parts = part.at("decoders");
    for (std::size_t i = 0; i < parts.size(); ++i) decoders_.push_back(read(parts.at(i)));
  }
  void decode(std::vector<std::string>& tokens) const override {
    for (const auto& decoder : decoders_) decoder->decode(tokens);
  }

 private:
  std::vector<std::unique_ptr<Decoder>> decoders_;
};

class Spaces : public Decoder {
 public:
  explicit Spaces(const Part& part) : fields_(part) {}
  void decode(std::vector<std::string>& tokens) const override {
    std::string mark;
    append(mark, fields_.replacement);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      replace_all(tokens[i], mark, i == 0 && fields_.scheme != Metaspace::Scheme::never ? "" : " ");
  }

 private:
  Metaspace fields_;
};

class ByteLevel : public Decoder {
 public:
  void decode(std::vector<std::string>& tokens) const override {
    std::string bytes;
    for (const std::string& token : tokens) {
      const std::size_t before = bytes.size();
      bool all = true;
      for_each_code_point(token, [&](char32_t point, std::size_t, std::size_t) {
        const int byte = point < kByteAlphabetEnd ? kBytesOfCharacters[point] : -1;
        all = all && byte >= 0;
        if (all) bytes.push_back(static_cast<char>(byte));
      });
      // A token with any other character stands for itself.
      if (!all) bytes.replace(before, std::string::npos, token);
    }
    tokens = {lossy(bytes)};
  }
};

class ByteFallback : public Decoder {
 public:
  void decode(std::vector<std::string>& tokens) const override {
    std::vector<std::string> result;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) return;
      if (invalid_utf8(bytes))
        result.insert(result.end(), bytes.size(), std::string(kReplacement));
      else
        result.push_back(bytes);
      bytes.clear();
    };
    for (std::string& token : tokens) {
      if (const std::optional<char> byte = byte_of(token)) {
        bytes.push_back(*byte);
      } else {
        flush();
        result.push_back(std::move(token));
      }
    }
    flush();
    tokens = std::move(result);
  }

 private:
  static std::optional<char> byte_of(std::string_view token) {
    if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return std::nullopt;
    const auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                    : -1;
    };
    // Rust reads a sign here, too.
    const int high = token[3] == '+' ? 0 : digit(token[3]), low = digit(token[4]);
    if (high < 0 || low < 0) return std::nullopt;
    return static_cast<char>(static_cast<unsigned char>(high * 16 + low));
  }
};

class Fuse : public Decoder {
 public:
  void decode(std::vector<std::string>& tokens) const override {
    std::string text;
    for (const std::string& token : tokens) text += token;
    tokens = {std::move(text)};
  }
};

class Strip : public Decoder {
 public:
  explicit Strip(const Part& part) : start_(part.at("start").count()), stop_(part.at("stop").count()) {
    append(content_, part.at("content").character());
  }
  void decode(std::vector<std::string>& tokens) const override {
    for (std::string& token : tokens) {
      std::size_t begin = 0, end = token.size();
      for (std::size_t i = 0; i < start_ && token.compare(begin, content_.size(), content_) == 0; ++i)
        begin += content_.size();
      for (std::size_t i = 0; i < stop_; ++i) {
        if (end == 0) throw impossible();
        if (end < content_.size() || token.compare(end - content_.size(), content_.size(), content_) != 0) break;
        end -= content_.size();
      }
      if (begin > end) throw impossible();
      token = token.substr(begin, end - begin);
    }
  }

 private:
  static Error impossible() {
    return failure(ErrorCode::bundle, "The decoder Strip of the tokenizer takes more from a token than there is", {},
                   "Build the bundle with a tokenizer that strips less at the end.");
  }

  std::string content_;
  std::size_t start_, stop_;
};

class Replace : public Decoder {
 public:
  explicit Replace(const Part& part)
      : pattern_(Pattern::read(part.at("pattern"))), content_(part.at("content").text()) {}
  void decode(std::vector<std::string>& tokens) const override {
    for (std::string& token : tokens) {
      std::string result;
      for (const Match& match : pattern_.matches(token)) {
        result += match.matched ? content_ : token.substr(match.begin, match.end - match.begin);
        check_length(result.size());
      }
      token = std::move(result);
    }
  }

 private:
  Pattern pattern_;
  std::string content_;
};

class WordPiece : public Decoder {
 public:
  explicit WordPiece(const Part& part) : prefix_(part.at("prefix").text()), cleanup_(part.at("cleanup").flag()) {}
  void decode(std::vector<std::string>& tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      std::string& token = tokens[i];
      if (i > 0) {
        if (token.compare(0, prefix_.size(), prefix_) == 0)
          token.erase(0, prefix_.size());
        else
          token.insert(0, " ");
      }
      if (cleanup_)
        for (const auto& [old, by] : kCleanup) replace_all(token, old, by);
    }
  }

 private:
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 11> kCleanup = {{
      {" .", "."},
      {" ?", "?"},
      {" !", "!"},
      {" ,", ","},
      {" ' ", "'"},
      {" n't", "n't"},
      {" 'm", "'m"},
      {" do not", " don't"},
      {" 's", "'s"},
      {" 've", "'ve"},
      {" 're", "'re"},
  }};

  std::string prefix_;
  bool cleanup_;
};

class Bpe : public Decoder {
 public:
  explicit Bpe(const Part& part) : suffix_(part.at("suffix").text()) {
    if (suffix_.empty()) throw part.refused("its suffix is empty");
  }
  void decode(std::vector<std::string>& tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) replace_all(tokens[i], suffix_, i + 1 == tokens.size() ? "" : " ");
  }

 private:
  std::string suffix_;
};

}  // namespace

std::unique_ptr<Decoder> Decoder::read(const Part& part) {
  const std::string type = part.type();
  if (type == "Sequence") return std::make_unique<Sequence>(part);
  if (type == "Metaspace") return std::make_unique<Spaces>(part);
  if (type == "ByteLevel") return std::make_unique<ByteLevel>();
  if (type == "ByteFallback") return std::make_unique<ByteFallback>();
  if (type == "Fuse") return std::make_unique<Fuse>();
  if (type == "Strip") return std::make_unique<Strip>(part);
  if (type == "Replace") return std::make_unique<Replace>(part);
  if (type == "WordPiece") return std::make_unique<WordPiece>(part);
  if (type == "BPEDecoder") return std::make_unique<Bpe>(part);
  throw part.unknown_type("decoder");
}

}  // namespace llm2slm::detail::tokenizing
