#include "model.hpp"

#include <algorithm>
#include <limits>

#include "../error.hpp"

namespace llm2slm::detail::tokenizing {

Vocabulary::Vocabulary(const Part& part) {
  if (!part.value().is_object()) throw part.refused("it is not an object of tokens and ids");
  tokens_.reserve(part.value().size());
  ids_.reserve(part.value().size());
  tokens_by_id_.reserve(part.value().size());
  for (const auto& [token, value] : part.value().items()) {
    // The path to a token is only written where it is needed: there are many.
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::numeric_limits<std::uint32_t>::max())
      throw Part(value, part.where() + "." + token).refused("it is not a 32-bit unsigned integer");
    const auto id = value.get<std::uint32_t>();
    tokens_.push_back(token);
    ids_.emplace(tokens_.back(), id);
    if (!tokens_by_id_.emplace(id, &tokens_.back()).second)
      throw part.refused("two tokens have the id " + std::to_string(id) + ", such as " + token);
    longest_ = std::max(longest_, token.size());
  }
}

std::string byte_token(unsigned char byte) {
  constexpr char kDigits[] = "0123456789ABCDEF";
  return std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + ">";
}

Error no_unknown_token(const std::string& what) {
  return failure(ErrorCode::bundle, "The tokenizer has no token for a part of the text.", {what},
                 "use a tokenizer with an unknown token");
}

std::unique_ptr<Model> Model::read(const Part& part) {
  // Files of old versions name no type.
  if (!part.has("type")) {
    if (part.has("merges")) return read_bpe(part);
    if (part.has("max_input_chars_per_word")) return read_wordpiece(part);
    if (part.has("unk_token")) return read_wordlevel(part);
    return read_unigram(part);
  }
  const std::string type = part.type();
  if (type == "Unigram") return read_unigram(part);
  if (type == "BPE") return read_bpe(part);
  if (type == "WordPiece") return read_wordpiece(part);
  if (type == "WordLevel") return read_wordlevel(part);
  throw part.unknown_type("model");
}

}  // namespace llm2slm::detail::tokenizing
