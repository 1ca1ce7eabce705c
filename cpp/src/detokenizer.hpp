// The text of a growing response: never half a character, never a part of a stop string.
#ifndef LLM2SLM_DETOKENIZER_HPP
#define LLM2SLM_DETOKENIZER_HPP

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace llm2slm::detail {

class Detokenizer {
 public:
  /// tokenizer, stop: outlive it. stop: strings that end the text, which is cut before the first of them.
  Detokenizer(const Tokenizer& tokenizer, const std::vector<std::string>& stop) : tokenizer_(&tokenizer), stop_(&stop) {}

  /// The text that became certain with this token; empty where none did.
  std::string push(std::int64_t token_id);
  /// What was held back, at the end of a response.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::string decoded(std::size_t from) const;
  std::string piece() const;
  std::string release(const std::string& piece, bool last);
  std::size_t stop_prefix() const;

  const Tokenizer* tokenizer_;
  const std::vector<std::string>* stop_;
  std::vector<std::int64_t> ids_;
  // A window of ids is decoded, not all of them; `shown_` is the part of it whose text is out.
  std::size_t start_ = 0, read_ = 0;
  std::string shown_, text_, held_;
  bool stopped_ = false;
};

/// Where the first of some strings begins in a text; npos: none does.
std::size_t find_first(const std::string& text, const std::vector<std::string>& strings);

}  // namespace llm2slm::detail

#endif
