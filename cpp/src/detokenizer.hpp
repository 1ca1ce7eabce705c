// Incremental detokenization: releases text that is certain, so no incomplete character and no beginning of a stop string.
#ifndef LLM2SLM_DETOKENIZER_HPP
#define LLM2SLM_DETOKENIZER_HPP

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace llm2slm::detail {

class Detokenizer {
 public:
  /// tokenizer, stop: outlive it. stop: strings that end the text; it is cut before the first.
  Detokenizer(const Tokenizer& tokenizer, const std::vector<std::string>& stop) : tokenizer_(&tokenizer), stop_(&stop) {}

  /// The text that this token makes certain; may be empty.
  std::string push(std::int64_t token_id);
  /// The held-back rest, at the end of a response.
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
  // Only a window of ids is decoded. `shown_` is the text of its part that was released.
  std::size_t start_ = 0, read_ = 0;
  std::string shown_, text_, held_;
  bool stopped_ = false;
};

/// The position of the first occurrence of any of the strings; npos if there is none.
std::size_t find_first(const std::string& text, const std::vector<std::string>& strings);

}  // namespace llm2slm::detail

#endif
