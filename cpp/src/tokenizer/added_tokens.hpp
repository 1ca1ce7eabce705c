// Tokens beside those of the model, found in text before anything else is done to it.
#ifndef LLM2SLM_TOKENIZER_ADDED_TOKENS_HPP
#define LLM2SLM_TOKENIZER_ADDED_TOKENS_HPP

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "byte_trie.hpp"
#include "document.hpp"
#include "model.hpp"
#include "normalizer.hpp"
#include "text.hpp"

namespace llm2slm::detail::tokenizing {

class AddedTokens {
 public:
  /// Read `added_tokens`. normalizer: may be null. Throws Error(bundle).
  AddedTokens(const Part& part, const Model& model, const Normalizer* normalizer);
  AddedTokens(const AddedTokens&) = delete;
  AddedTokens& operator=(const AddedTokens&) = delete;

  /// Take the tokens that stand for themselves out of a text, normalize the rest, and take the others out of that.
  ///
  /// split_special: leave the special ones in it, as text.
  Pieces extract(Text&& text, const Normalizer* normalizer, bool split_special) const;

  /// The string of an added token for decoding; null where the id is none.
  const std::string* token_of(std::uint32_t id) const;
  /// Whether a token of this string, be it of the model or added, is special.
  bool is_special(const std::string& token) const { return special_.count(token) != 0; }
  /// How many there are that the model does not have.
  std::size_t count_beside(const Model& model) const;

 private:
  struct Token {
    std::string content, decoded;
    bool single_word, left, right, normalized, special;
  };

  void split(Text&& text, const ByteTrie& trie, bool split_special, Pieces& into) const;

  std::unordered_map<std::uint32_t, Token> tokens_;
  std::unordered_map<std::string, std::uint32_t> ids_;
  std::unordered_set<std::string> special_;
  ByteTrie plain_, normalized_;
  bool has_plain_ = false, has_normalized_ = false;
};

}  // namespace llm2slm::detail::tokenizing

#endif
