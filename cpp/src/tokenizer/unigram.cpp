#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "byte_trie.hpp"
#include "code_points.hpp"
#include "model.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

/// What an unknown character costs more than the least likely token.
constexpr double kUnknownPenalty = 10.0;

/// SentencePiece's unigram model: the pieces whose log-probabilities have the largest sum.
class Unigram : public Model {
 public:
  explicit Unigram(const Part& part) {
    const Part vocabulary = part.at("vocab");
    const std::size_t count = vocabulary.size();
    if (count >= std::numeric_limits<std::uint32_t>::max()) throw vocabulary.refused("it has too many tokens");
    tokens_.reserve(count);
    scores_.reserve(count);
    ids_.reserve(count);
    std::vector<std::pair<std::string_view, std::uint32_t>> entries;
    entries.reserve(count);
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < count; ++i) {
      const nlohmann::json& entry = vocabulary.value()[i];
      if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number())
        throw vocabulary.at(i).refused("it is not a pair of a token and a score");
      const auto id = static_cast<std::uint32_t>(i);
      tokens_.push_back(entry[0].get<std::string>());
      scores_.push_back(entry[1].get<double>());
      least = std::min(least, scores_.back());
      // Of equal tokens the last one counts.
      ids_[tokens_.back()] = id;
      entries.emplace_back(tokens_.back(), id);
    }
    trie_ = ByteTrie(std::move(entries));
    unknown_score_ = least - kUnknownPenalty;
    if (part.has("unk_id")) {
      const std::size_t unknown = part.at("unk_id").count();
      if (unknown >= count) throw part.at("unk_id").refused("no token has this id");
      unknown_ = static_cast<std::uint32_t>(unknown);
    }
    if (part.flag_or("byte_fallback", false)) {
      byte_fallback_ = true;
      for (unsigned byte = 0; byte < 256; ++byte) bytes_[byte] = id_of(byte_token(static_cast<unsigned char>(byte)));
    }
  }

  void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override {
    // The best path to every place: the token that ends there, and where it begins.
    struct Step {
      double score = 0.0;
      std::size_t begin = kNowhere;
      std::uint32_t id = 0;
    };
    std::vector<Step> best(piece.size() + 1);
    for (std::size_t begin = 0; begin < piece.size();) {
      const double score_here = best[begin].score;
      const std::size_t length_here = length_of(piece[begin]);
      bool has_character = false;
      const auto offer = [&](std::size_t length, std::uint32_t id, double score) {
        Step& step = best[begin + length];
        if (step.begin != kNowhere && score <= step.score) return;
        step = {score, begin, id};
      };
      trie_.prefixes(piece.substr(begin), [&](std::size_t length, std::uint32_t id) {
        offer(length, id, scores_[id] + score_here);
        has_character = has_character || length == length_here;
      });
      if (!has_character) {
        if (best[begin + length_here].begin == kNowhere ||
            unknown_score_ + score_here > best[begin + length_here].score) {
          if (!unknown_) throw no_unknown_token(std::string(piece.substr(begin, length_here)));
          offer(length_here, *unknown_, unknown_score_ + score_here);
        }
      }
      begin += length_here;
    }
    // Backwards; unknown characters beside each other are one piece.
    std::vector<std::pair<std::size_t, std::size_t>> spans;
    bool fused = false;
    for (std::size_t end = piece.size(); end > 0;) {
      const Step& step = best[end];
      const bool unknown = unknown_ && step.id == *unknown_;
      if (unknown && fused)
        spans.back().first = step.begin;
      else
        spans.emplace_back(step.begin, end);
      fused = unknown;
      end = step.begin;
    }
    for (auto span = spans.rbegin(); span != spans.rend(); ++span)
      add(piece.substr(span->first, span->second - span->first), ids);
  }

  std::optional<std::uint32_t> id_of(std::string_view token) const override {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  const std::string* token_of(std::uint32_t id) const override { return id < tokens_.size() ? &tokens_[id] : nullptr; }
  std::size_t size() const override { return tokens_.size(); }

 private:
  static constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();

  void add(std::string_view span, std::vector<std::uint32_t>& ids) const {
    if (const auto id = id_of(span)) {
      ids.push_back(*id);
      return;
    }
    if (byte_fallback_) {
      const auto has_token = [&](char byte) { return bytes_[static_cast<unsigned char>(byte)].has_value(); };
      if (std::all_of(span.begin(), span.end(), has_token)) {
        for (const char byte : span) ids.push_back(*bytes_[static_cast<unsigned char>(byte)]);
        return;
      }
    }
    if (!unknown_) throw no_unknown_token(std::string(span));
    ids.push_back(*unknown_);
  }

  std::vector<std::string> tokens_;
  std::vector<double> scores_;
  // Views into the strings above, which never move.
  std::unordered_map<std::string_view, std::uint32_t> ids_;
  ByteTrie trie_;
  double unknown_score_ = 0.0;
  std::optional<std::uint32_t> unknown_;
  bool byte_fallback_ = false;
  std::array<std::optional<std::uint32_t>, 256> bytes_{};
};

}  // namespace

std::unique_ptr<Model> read_unigram(const Part& part) { return std::make_unique<Unigram>(part); }

}  // namespace llm2slm::detail::tokenizing
