// What makes tokens of a piece of text.
#ifndef LLM2SLM_TOKENIZER_MODEL_HPP
#define LLM2SLM_TOKENIZER_MODEL_HPP

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "document.hpp"

namespace llm2slm::detail::tokenizing {

/// A model of a tokenizer.json; any number of threads may use one.
class Model {
 public:
  virtual ~Model() = default;
  /// Append the ids of a piece of text, which is not empty.
  ///
  /// Throws Error(bundle) where the text is unknown and the model has no token for that.
  virtual void tokenize(std::string_view piece, std::vector<std::uint32_t>& ids) const = 0;
  virtual std::optional<std::uint32_t> id_of(std::string_view token) const = 0;
  /// Null where no token has this id.
  virtual const std::string* token_of(std::uint32_t id) const = 0;
  virtual std::size_t size() const = 0;

  /// Throws Error(bundle) for one that is not known here.
  static std::unique_ptr<Model> read(const Part& part);

 protected:
  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
};

std::unique_ptr<Model> read_unigram(const Part& part);
std::unique_ptr<Model> read_bpe(const Part& part);
std::unique_ptr<Model> read_wordpiece(const Part& part);
std::unique_ptr<Model> read_wordlevel(const Part& part);

/// Tokens with their ids.
class Vocabulary {
 public:
  /// A `{token: id, …}` of the document. Throws Error(bundle) for anything else, and for two tokens with one id.
  explicit Vocabulary(const Part& part);
  Vocabulary(const Vocabulary&) = delete;
  Vocabulary& operator=(const Vocabulary&) = delete;

  std::optional<std::uint32_t> id_of(std::string_view token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  const std::string* token_of(std::uint32_t id) const {
    const auto found = tokens_by_id_.find(id);
    return found == tokens_by_id_.end() ? nullptr : found->second;
  }
  std::size_t size() const { return ids_.size(); }
  /// Bytes of the longest token.
  std::size_t longest() const { return longest_; }

 private:
  std::vector<std::string> tokens_;
  // Views and pointers into the strings above, which never move.
  std::unordered_map<std::string_view, std::uint32_t> ids_;
  std::unordered_map<std::uint32_t, const std::string*> tokens_by_id_;
  std::size_t longest_ = 0;
};

/// The name of the token of a byte, such as <0x0A>.
std::string byte_token(unsigned char byte);

/// An Error for text that a model has no token for.
Error no_unknown_token(const std::string& what);

}  // namespace llm2slm::detail::tokenizing

#endif
