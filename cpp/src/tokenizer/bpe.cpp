#include <algorithm>
#include <array>
#include <limits>
#include <queue>
#include <utility>

#include "code_points.hpp"
#include "model.hpp"
#include "pair_map.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

/// Byte-pair encoding: characters, of which the pair that was merged first in training is merged first.
class Bpe : public Model {
 public:
  explicit Bpe(const Part& part) : vocabulary_(part.at("vocab")), merges_(part.at("merges").size()) {
    if (part.has("dropout") && part.at("dropout").number() != 0.0)
      throw part.refused("dropout makes its tokens random");
    if (part.has("continuing_subword_prefix")) prefix_ = part.at("continuing_subword_prefix").text();
    if (part.has("end_of_word_suffix")) suffix_ = part.at("end_of_word_suffix").text();
    fuse_unknown_ = part.flag_or("fuse_unk", false);
    ignore_merges_ = part.flag_or("ignore_merges", false);
    if (part.has("unk_token")) {
      has_unknown_ = true;
      unknown_ = vocabulary_.id_of(part.at("unk_token").text());
    }
    if (part.flag_or("byte_fallback", false)) {
      byte_fallback_ = true;
      for (unsigned byte = 0; byte < 256; ++byte)
        bytes_[byte] = vocabulary_.id_of(byte_token(static_cast<unsigned char>(byte)));
    }
    read_merges(part.at("merges"));
    for (char32_t point = 0; point < short_ids_.size(); ++point) {
      std::string character;
      append(character, point);
      short_ids_[point] = vocabulary_.id_of(character);
    }
  }

  void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const override {
    if (ignore_merges_) {
      if (const auto id = vocabulary_.id_of(piece)) {
        ids.push_back(*id);
        return;
      }
    }
    std::vector<Symbol> symbols = characters(piece);
    merge(symbols);
    for (const Symbol& symbol : symbols)
      if (!symbol.removed) ids.push_back(symbol.id);
  }

  std::optional<std::uint32_t> id_of(std::string_view token) const override { return vocabulary_.id_of(token); }
  const std::string* token_of(std::uint32_t id) const override { return vocabulary_.token_of(id); }
  std::size_t size() const override { return vocabulary_.size(); }

 private:
  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  struct Symbol {
    std::uint32_t id;
    bool removed;
    std::size_t previous, next;
  };

  void read_merges(const Part& merges) {
    std::uint32_t rank = 0;
    for (std::size_t i = 0; i < merges.size(); ++i) {
      // A pair, or one string with a space between.
      const nlohmann::json& entry = merges.value()[i];
      std::string left, right;
      if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
        left = entry[0].get<std::string>();
        right = entry[1].get<std::string>();
      } else if (entry.is_string()) {
        const auto& text = entry.get_ref<const std::string&>();
        if (text.compare(0, 8, "#version") == 0) continue;
        const std::size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
          throw merges.at(i).refused("it is not two tokens separated by a space");
        left = text.substr(0, space);
        right = text.substr(space + 1);
      } else {
        throw merges.at(i).refused("it is not a pair of tokens");
      }
      const auto left_id = vocabulary_.id_of(left), right_id = vocabulary_.id_of(right);
      if (!left_id || !right_id || right.size() < prefix_.size())
        throw merges.at(i).refused("it joins strings that are not tokens");
      const auto joined = vocabulary_.id_of(left + right.substr(prefix_.size()));
      if (!joined) throw merges.at(i).refused("its result is not a token");
      merges_.put(*left_id, *right_id, {rank++, *joined});
    }
  }

  std::vector<Symbol> characters(std::string_view piece) const {
    std::vector<Symbol> symbols;
    symbols.reserve(piece.size());
    const auto add = [&](std::uint32_t id) {
      const std::size_t index = symbols.size();
      if (index > 0) symbols.back().next = index;
      symbols.push_back({id, false, index > 0 ? index - 1 : kNone, kNone});
    };
    std::optional<std::uint32_t> unknown;
    std::string scratch;
    for_each_code_point(piece, [&](char32_t point, std::size_t offset, std::size_t length) {
      std::string_view character = piece.substr(offset, length);
      const bool first = offset == 0, last = offset + length == piece.size();
      const bool plain = (first || prefix_.empty()) && (!last || suffix_.empty());
      std::optional<std::uint32_t> id;
      if (plain) {
        id = point < short_ids_.size() ? short_ids_[point] : vocabulary_.id_of(character);
      } else {
        scratch.assign(first ? "" : prefix_);
        scratch.append(character);
        if (last) scratch.append(suffix_);
        character = scratch;
        id = vocabulary_.id_of(character);
      }
      if (id) {
        if (unknown) add(*unknown);
        unknown.reset();
        add(*id);
        return;
      }
      if (byte_fallback_) {
        const auto has_token = [&](char byte) { return bytes_[static_cast<unsigned char>(byte)].has_value(); };
        if (std::all_of(character.begin(), character.end(), has_token)) {
          // What is unknown before them comes after them: the library does so.
          for (const char byte : character) add(*bytes_[static_cast<unsigned char>(byte)]);
          return;
        }
      }
      if (!has_unknown_) return;
      if (unknown && fuse_unknown_) return;
      if (unknown) add(*unknown);
      if (!unknown_) throw no_unknown_token(std::string(character));
      unknown = unknown_;
    });
    if (unknown) add(*unknown);
    return symbols;
  }

  void merge(std::vector<Symbol>& symbols) const {
    struct Candidate {
      std::uint32_t rank, id;
      std::size_t at;
      // The largest of a heap is what was merged first in training, and of that the leftmost.
      bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
    };
    std::vector<Candidate> heap;
    heap.reserve(symbols.size());
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
      if (const Merge* found = merges_.find(symbols[i].id, symbols[i + 1].id))
        heap.push_back({found->rank, found->id, i});
    std::make_heap(heap.begin(), heap.end());
    const auto push = [&](std::size_t left, std::size_t right) {
      const Merge* found = merges_.find(symbols[left].id, symbols[right].id);
      if (found == nullptr) return;
      heap.push_back({found->rank, found->id, left});
      std::push_heap(heap.begin(), heap.end());
    };
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Candidate top = heap.back();
      heap.pop_back();
      Symbol& left = symbols[top.at];
      if (left.removed || left.next == kNone) continue;
      const std::size_t right_index = left.next;
      Symbol& right = symbols[right_index];
      // Another merge may have changed either since.
      const Merge* found = merges_.find(left.id, right.id);
      if (found == nullptr || found->id != top.id) continue;
      left.id = top.id;
      left.next = right.next;
      right.removed = true;
      if (right.next != kNone) symbols[right.next].previous = top.at;
      if (left.previous != kNone) push(left.previous, top.at);
      if (left.next != kNone) push(top.at, left.next);
    }
  }

  Vocabulary vocabulary_;
  PairMap merges_;
  std::string prefix_, suffix_;
  // unk_token may be named and yet be no token, which only matters where something is unknown.
  bool has_unknown_ = false, fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
  std::optional<std::uint32_t> unknown_;
  std::array<std::optional<std::uint32_t>, 256> bytes_{};
  // Ids of the characters that are most frequent, which include all of byte-level tokenizers.
  std::array<std::optional<std::uint32_t>, 0x180> short_ids_{};
};

}  // namespace

std::unique_ptr<Model> read_bpe(const Part& part) { return std::make_unique<Bpe>(part); }

}  // namespace llm2slm::detail::tokenizing
