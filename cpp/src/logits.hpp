// Views of the logits of a decoder call. The decoder's state owns the memory until its next call.
#ifndef LLM2SLM_LOGITS_HPP
#define LLM2SLM_LOGITS_HPP

#include <cstddef>
#include <vector>

namespace llm2slm::detail {

/// The logits of one position of each row, [rows] each [vocab].
using Logits = std::vector<const float*>;

/// The logits [rows, tokens, vocab] of some rows of a call, and of their first tokens.
class Positions {
 public:
  /// data: [rows, stride, vocab] with stride ≥ tokens; null if there are no tokens.
  Positions(const float* data, std::size_t rows, std::size_t tokens, std::size_t stride, std::size_t vocab)
      : data_(data), rows_(rows), tokens_(tokens), stride_(stride), vocab_(vocab) {}

  std::size_t rows() const { return rows_; }
  std::size_t tokens() const { return tokens_; }
  std::size_t vocab() const { return vocab_; }
  /// [vocab]
  const float* at(std::size_t row, std::size_t token) const { return data_ + (row * stride_ + token) * vocab_; }

  /// The logits of each row's first token.
  Logits first() const {
    Logits all(rows_);
    for (std::size_t row = 0; row < rows_; ++row) all[row] = at(row, 0);
    return all;
  }

  /// `rows` rows from `first_row` on, with their first `tokens` tokens.
  Positions part(std::size_t first_row, std::size_t rows, std::size_t tokens) const {
    return {tokens == 0 ? nullptr : at(first_row, 0), rows, tokens, stride_, vocab_};
  }

 private:
  const float* data_;
  std::size_t rows_, tokens_, stride_, vocab_;
};

}  // namespace llm2slm::detail

#endif
