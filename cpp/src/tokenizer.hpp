// Text to token ids and back, as a tokenizer.json of Hugging Face says; the same ids and text as Python's `tokenizers`.
#ifndef LLM2SLM_TOKENIZER_HPP
#define LLM2SLM_TOKENIZER_HPP

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace llm2slm::detail {

/// A text as token ids.
struct Encoded {
  std::vector<std::int64_t> ids;
  /// Whether the post-processor added the last of them: the last of `special_tokens_mask`.
  bool ends_with_special = false;
};

/// How a text is encoded. special_tokens: with what the post-processor adds. split_special_tokens: text that spells a special token
/// is taken as any other text, as transformers' tokenizers do with the option of that name.
struct EncodeOptions {
  bool special_tokens = true;
  bool split_special_tokens = false;
};

/// What a tokenizer.json describes. Never changed once made: any number of threads may use one.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Read a tokenizer.json.
  ///
  /// Throws Error(bundle): no such file, no JSON, or a component that is not known here, named with its type.
  static std::shared_ptr<const Tokenizer> load(const std::filesystem::path& tokenizer_json);

  /// The same from memory; `name` is what messages call it.
  static std::shared_ptr<const Tokenizer> parse(std::string_view json, const std::string& name);

  /// The ids of a text, neither padded nor cut.
  ///
  /// Throws Error(prompt): bytes that are not UTF-8. Error(bundle): text that the tokenizer has no token for, not even
  /// one for what is unknown, or tables that point outside themselves.
  virtual Encoded encode(std::string_view utf8, const EncodeOptions& options) const = 0;
  Encoded encode(std::string_view utf8) const { return encode(utf8, EncodeOptions{}); }

  /// The text of ids, without special tokens. Ids without a token are passed over, as Python does.
  ///
  /// Throws Error(usage): an id that is no 32-bit unsigned integer.
  virtual std::string decode(const std::vector<std::int64_t>& ids) const = 0;

  /// The token of an id; null where there is none.
  virtual const std::string* token_of(std::int64_t id) const = 0;

  /// Number of tokens, added ones included.
  virtual std::size_t size() const = 0;

 protected:
  Tokenizer() = default;
};

}  // namespace llm2slm::detail

#endif
