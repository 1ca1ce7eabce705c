#include "pre_tokenizer.hpp"

#include <utility>

#include "byte_alphabet.hpp"
#include "code_points.hpp"
#include "pattern.hpp"
#include "unicode.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

// GPT-2's, of every ByteLevel that does not switch it off.
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Behavior behavior_of(const Part& part) {
  const std::string& name = part.text();
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  throw part.refused("the behavior " + name + " is not known");
}

class Sequence : public PreTokenizer {
 public:
  explicit Sequence(const Part& part) {
    const Part parts = part.at("pretokenizers");
    for (std::size_t i = 0; i < parts.size(); ++i) parts_.push_back(read(parts.at(i)));
  }
  void split(Pieces& pieces) const override {
    for (const auto& part : parts_) part->split(pieces);
  }
  bool asks_for_start() const override {
    for (const auto& part : parts_)
      if (part->asks_for_start()) return true;
    return false;
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> parts_;
};

/// Splits at every code point for which a test holds.
template <typename Test>
class Characters : public PreTokenizer {
 public:
  Characters(Test test, Behavior behavior) : test_(test), behavior_(behavior) {}
  void split(Pieces& pieces) const override {
    split_pieces(pieces,
                 [&](Text&& text, Pieces& into) { split_at(text, matches_of(text.str(), test_), behavior_, into); });
  }

 private:
  Test test_;
  Behavior behavior_;
};

template <typename Test>
std::unique_ptr<PreTokenizer> at_characters(Test test, Behavior behavior) {
  return std::make_unique<Characters<Test>>(test, behavior);
}

class Bert : public PreTokenizer {
 public:
  void split(Pieces& pieces) const override {
    split_pieces(pieces, [](Text&& text, Pieces& into) {
      split_at(text, matches_of(text.str(), is_space), Behavior::removed, into);
    });
    split_pieces(pieces, [](Text&& text, Pieces& into) {
      split_at(text, matches_of(text.str(), is_punctuation), Behavior::isolated, into);
    });
  }
};

/// Runs of characters of words, and runs of what are neither those nor white space.
class Whitespace : public PreTokenizer {
 public:
  void split(Pieces& pieces) const override {
    enum class Kind { space, word, other };
    split_pieces(pieces, [](Text&& text, Pieces& into) {
      Kind run = Kind::space;
      std::size_t begin = 0;
      const auto end_run = [&](std::size_t end) {
        if (run != Kind::space) into.push_back({text.slice(begin, end), std::nullopt});
      };
      for_each_code_point(text.str(), [&](char32_t point, std::size_t offset, std::size_t) {
        const Kind kind = is_word(point) ? Kind::word : is_space(point) ? Kind::space : Kind::other;
        if (kind == run) return;
        end_run(offset);
        run = kind;
        begin = offset;
      });
      end_run(text.str().size());
    });
  }
};

class Split : public PreTokenizer {
 public:
  explicit Split(const Part& part)
      : pattern_(Pattern::read(part.at("pattern"))),
        behavior_(behavior_of(part.at("behavior"))),
        inverted_(part.at("invert").flag()) {}

  void split(Pieces& pieces) const override {
    split_pieces(pieces, [&](Text&& text, Pieces& into) {
      std::vector<Match> matches = pattern_.matches(text.str());
      if (inverted_)
        for (Match& match : matches) match.matched = !match.matched;
      split_at(text, std::move(matches), behavior_, into);
    });
  }

 private:
  Pattern pattern_;
  Behavior behavior_;
  bool inverted_;
};

class ByteLevel : public PreTokenizer {
 public:
  explicit ByteLevel(const Part& part) : prefix_(part.at("add_prefix_space").flag()) {
    // Offsets are not made here; the field is required all the same.
    static_cast<void>(part.at("trim_offsets").flag());
    if (part.flag_or("use_regex", true)) pattern_ = std::make_unique<Pattern>(Pattern::regex(kByteLevelPattern, part));
  }

  void split(Pieces& pieces) const override {
    split_pieces(pieces, [&](Text&& text, Pieces& into) {
      if (prefix_ && text.str().front() != ' ') text.prepend(" ");
      if (pattern_)
        split_at(text, pattern_->matches(text.str()), Behavior::isolated, into);
      else
        add_piece(into, std::move(text));
    });
    for (Piece& piece : pieces)
      if (!piece.token) map_bytes(piece.text);
  }

 private:
  static void map_bytes(Text& text) {
    if (text.tracked()) {
      std::vector<Change> changes;
      for (const char byte : text.str())
        changes.push_back({kByteAlphabet[static_cast<unsigned char>(byte)], continues(byte) ? 1 : 0});
      text.transform(changes, 0);
      return;
    }
    std::string mapped;
    mapped.reserve(text.str().size() * 2);
    for (const char byte : text.str()) append(mapped, kByteAlphabet[static_cast<unsigned char>(byte)]);
    text.assign(std::move(mapped));
  }

  bool prefix_;
  std::unique_ptr<const Pattern> pattern_;
};

class Spaces : public PreTokenizer {
 public:
  explicit Spaces(const Part& part) : fields_(part) { append(mark_, fields_.replacement); }

  void split(Pieces& pieces) const override {
    split_pieces(pieces, [&](Text&& text, Pieces& into) {
      if (text.str().find(' ') != std::string::npos)
        text.replace(matches_of(text.str(), [](char32_t point) { return point == ' '; }), mark_);
      const bool marked = text.str().compare(0, mark_.size(), mark_) == 0;
      if (!marked && (fields_.scheme == Metaspace::Scheme::always ||
                      (fields_.scheme == Metaspace::Scheme::first && text.at_start())))
        text.prepend(mark_);
      if (fields_.split)
        split_at(text, matches_of(text.str(), [&](char32_t point) { return point == fields_.replacement; }),
                 Behavior::merged_with_next, into);
      else
        add_piece(into, std::move(text));
    });
  }
  bool asks_for_start() const override { return fields_.scheme == Metaspace::Scheme::first; }

 private:
  Metaspace fields_;
  std::string mark_;
};

}  // namespace

Metaspace::Metaspace(const Part& part)
    : replacement(part.at("replacement").character()), split(part.flag_or("split", true)) {
  if (part.has("prepend_scheme")) {
    const std::string& name = part.at("prepend_scheme").text();
    if (name == "first")
      scheme = Scheme::first;
    else if (name == "never")
      scheme = Scheme::never;
    else if (name != "always")
      throw part.refused("the prepend_scheme " + name + " is not known");
  }
  // The field of older files.
  if (!part.flag_or("add_prefix_space", true)) {
    if (scheme != Scheme::never) throw part.refused("add_prefix_space is false, but prepend_scheme is not never");
    scheme = Scheme::never;
  }
}

std::unique_ptr<PreTokenizer> PreTokenizer::read(const Part& part) {
  const std::string type = part.type();
  if (type == "Sequence") return std::make_unique<Sequence>(part);
  if (type == "ByteLevel") return std::make_unique<ByteLevel>(part);
  if (type == "Metaspace") return std::make_unique<Spaces>(part);
  if (type == "Split") return std::make_unique<Split>(part);
  if (type == "Whitespace") return std::make_unique<Whitespace>();
  if (type == "WhitespaceSplit") return at_characters(is_space, Behavior::removed);
  if (type == "BertPreTokenizer") return std::make_unique<Bert>();
  if (type == "Digits")
    return at_characters(is_numeric, part.at("individual_digits").flag() ? Behavior::isolated : Behavior::contiguous);
  if (type == "Punctuation")
    return at_characters(is_punctuation, part.has("behavior") ? behavior_of(part.at("behavior")) : Behavior::isolated);
  throw part.unknown_type("pre-tokenizer");
}

}  // namespace llm2slm::detail::tokenizing
