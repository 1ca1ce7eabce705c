#include "added_tokens.hpp"

#include <algorithm>
#include <set>
#include <utility>

#include "code_points.hpp"
#include "unicode.hpp"

namespace llm2slm::detail::tokenizing {
namespace {

bool ends_with_word(std::string_view text) {
  std::size_t last = text.size() - 1;
  while (continues(text[last])) --last;
  return is_word(code_point_at(text, last));
}

std::size_t end_of_spaces(std::string_view text, std::size_t begin) {
  while (begin < text.size() && is_space(code_point_at(text, begin))) begin += length_of(text[begin]);
  return begin;
}

std::size_t begin_of_spaces(std::string_view text, std::size_t end) {
  while (end > 0) {
    std::size_t last = end - 1;
    while (continues(text[last])) --last;
    if (!is_space(code_point_at(text, last))) break;
    end = last;
  }
  return end;
}

/// All of a text as a piece of it, which is where it begins.
Text whole(Text&& text) { return text.tracked() ? text.slice(0, text.str().size()) : std::move(text); }

}  // namespace

AddedTokens::AddedTokens(const Part& part, const Model& model, const Normalizer* normalizer) {
  // The ids of the file are not used: a token that the model does not have gets the next one.
  std::size_t next = model.size();
  std::unordered_map<std::uint32_t, std::string> normalized;
  for (std::size_t i = 0; i < part.size(); ++i) {
    const Part entry = part.at(i);
    static_cast<void>(entry.at("id").id());
    const std::string& content = entry.at("content").text();
    Token token{content,
                content,
                entry.at("single_word").flag(),
                entry.at("lstrip").flag(),
                entry.at("rstrip").flag(),
                entry.at("normalized").flag(),
                entry.at("special").flag()};
    if (content.empty()) continue;
    std::uint32_t id = 0;
    if (const auto known = ids_.find(content); known != ids_.end()) {
      id = known->second;
    } else if (const auto of_model = model.id_of(content)) {
      id = *of_model;
    } else {
      if (next > 0xFFFFFFFF) throw entry.refused("there are too many tokens");
      id = static_cast<std::uint32_t>(next++);
    }
    if (token.normalized && normalizer != nullptr) {
      Text text(content, false);
      normalizer->normalize(text);
      if (text.str() != content) normalized[id] = text.str();
    }
    ids_[content] = id;
    if (token.special) special_.insert(content);
    tokens_.insert_or_assign(id, std::move(token));
  }

  std::vector<std::pair<std::string_view, std::uint32_t>> plain, others;
  std::set<std::string_view> seen;
  for (auto& [id, token] : tokens_) {
    if (const auto found = normalized.find(id); found != normalized.end()) token.decoded = found->second;
    if (!token.normalized) {
      plain.emplace_back(token.content, id);
      continue;
    }
    if (token.decoded.empty()) throw part.refused("of the token " + token.content + " normalization leaves nothing");
    if (!seen.insert(token.decoded).second)
      throw part.refused("normalization makes two tokens the same: " + token.decoded);
    others.emplace_back(token.decoded, id);
  }
  has_plain_ = !plain.empty();
  has_normalized_ = !others.empty();
  plain_ = ByteTrie(std::move(plain));
  normalized_ = ByteTrie(std::move(others));
}

Pieces AddedTokens::extract(Text&& text, const Normalizer* normalizer, bool split_special) const {
  Pieces pieces;
  if (has_plain_)
    split(std::move(text), plain_, split_special, pieces);
  else
    add_piece(pieces, whole(std::move(text)));
  split_pieces(pieces, [&](Text&& piece, Pieces& into) {
    if (normalizer != nullptr) normalizer->normalize(piece);
    if (has_normalized_)
      split(std::move(piece), normalized_, split_special, into);
    else
      add_piece(into, whole(std::move(piece)));
  });
  return pieces;
}

void AddedTokens::split(Text&& text, const ByteTrie& trie, bool split_special, Pieces& into) const {
  const std::string_view all = text.str();
  std::size_t done = 0;
  const auto add = [&](std::size_t begin, std::size_t end, std::optional<std::uint32_t> id) {
    add_piece(into, text.slice(begin, end), id);
  };
  for (std::size_t at = 0; at < all.size();) {
    std::size_t length = 0;
    std::uint32_t id = 0;
    trie.prefixes(all.substr(at), [&](std::size_t longer, std::uint32_t value) {
      length = longer;
      id = value;
    });
    if (length == 0) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + length;
    at = end;
    const Token& token = tokens_.at(id);
    if (split_special && is_special(token.content)) continue;
    if (token.single_word &&
        ((begin > 0 && ends_with_word(all.substr(0, begin))) || (end < all.size() && is_word(code_point_at(all, end)))))
      continue;
    if (token.left) begin = std::max(begin_of_spaces(all, begin), done);
    if (token.right) end = end_of_spaces(all, end);
    if (done < begin) add(done, begin, std::nullopt);
    add(begin, end, id);
    done = end;
  }
  if (done == 0)
    add_piece(into, whole(std::move(text)));
  else if (done < all.size())
    add(done, all.size(), std::nullopt);
}

const std::string* AddedTokens::token_of(std::uint32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second.decoded;
}

std::size_t AddedTokens::count_beside(const Model& model) const {
  return static_cast<std::size_t>(
      std::count_if(ids_.begin(), ids_.end(), [&](const auto& entry) { return !model.id_of(entry.first); }));
}

}  // namespace llm2slm::detail::tokenizing
