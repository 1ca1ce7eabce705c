#include <algorithm>

#include "code_points.hpp"
#include "model.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

Error no_unknown_word(std::string_view word) { return no_unknown_token(std::string(word.substr(0, 200))); }

/// The longest token that a word begins with, then the longest that what is left begins with; all or unknown.
class WordPiece : public Model {
 public:
  explicit WordPiece(const Part& part)
      : vocabulary_(part.at("vocab")),
        unknown_(vocabulary_.id_of(part.at("unk_token").text())),
        prefix_(part.at("continuing_subword_prefix").text()),
        most_characters_(part.at("max_input_chars_per_word").count()) {}

  void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override {
    const std::size_t before = ids.size();
    if (count_code_points(piece) > most_characters_ || !find(piece, ids)) {
      if (!unknown_) throw no_unknown_word(piece);
      ids.resize(before);
      ids.push_back(*unknown_);
    }
  }

  std::optional<std::uint32_t> id_of(std::string_view token) const override { return vocabulary_.id_of(token); }
  const std::string* token_of(std::uint32_t id) const override { return vocabulary_.token_of(id); }
  std::size_t size() const override { return vocabulary_.size(); }

 private:
  bool find(std::string_view piece, std::vector<std::uint32_t>& ids) const {
    std::string candidate;
    for (std::size_t begin = 0; begin < piece.size();) {
      candidate.assign(begin > 0 ? prefix_ : "");
      const std::size_t added = candidate.size();
      if (vocabulary_.longest() <= added) return false;
      // No token is longer than the longest.
      std::size_t length = std::min(piece.size() - begin, vocabulary_.longest() - added);
      while (begin + length < piece.size() && continues(piece[begin + length])) --length;
      candidate.append(piece.substr(begin, length));
      std::optional<std::uint32_t> id;
      while (length > 0) {
        id = vocabulary_.id_of(std::string_view(candidate).substr(0, added + length));
        if (id) break;
        do --length;
        while (continues(candidate[added + length]));
      }
      if (!id) return false;
      ids.push_back(*id);
      begin += length;
    }
    return true;
  }

  Vocabulary vocabulary_;
  std::optional<std::uint32_t> unknown_;
  std::string prefix_;
  std::size_t most_characters_;
};

/// Every piece is a token or unknown.
class WordLevel : public Model {
 public:
  explicit WordLevel(const Part& part)
      : vocabulary_(part.at("vocab")), unknown_(vocabulary_.id_of(part.at("unk_token").text())) {}

  void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override {
    const auto id = vocabulary_.id_of(piece);
    if (!id && !unknown_) throw no_unknown_word(piece);
    ids.push_back(id ? *id : *unknown_);
  }

  std::optional<std::uint32_t> id_of(std::string_view token) const override { return vocabulary_.id_of(token); }
  const std::string* token_of(std::uint32_t id) const override { return vocabulary_.token_of(id); }
  std::size_t size() const override { return vocabulary_.size(); }

 private:
  Vocabulary vocabulary_;
  std::optional<std::uint32_t> unknown_;
};

}  // namespace

std::unique_ptr<Model> read_wordpiece(const Part& part) { return std::make_unique<WordPiece>(part); }
std::unique_ptr<Model> read_wordlevel(const Part& part) { return std::make_unique<WordLevel>(part); }

}  // namespace llm2slm::detail::tokenizing
