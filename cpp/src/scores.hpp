// Scores of next tokens in float32, as numpy computes them: maxima, softmax and warpers.
//
// A row is [num_tokens] scores. A name that starts with `keep` is a warper: only sampling uses it. `least` ids of a row stay.
#ifndef LLM2SLM_SCORES_HPP
#define LLM2SLM_SCORES_HPP

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace llm2slm::detail {

inline constexpr float kNever = -std::numeric_limits<float>::infinity();

/// A view of one row of scores.
struct Row {
  float* data;
  std::size_t size;
  float* begin() const { return data; }
  float* end() const { return data + size; }
  float& operator[](std::size_t i) const { return data[i]; }
};

/// The highest score; NaN where there is one.
float maximum(const float* scores, std::size_t size);

/// The column of the highest score, the first of equals; of a NaN where there is one.
std::size_t argmax(const float* scores, std::size_t size);

/// The columns of the `count` highest scores (all, if there are fewer), best first; ties go to the first column.
std::vector<std::size_t> highest(const float* scores, std::size_t size, std::size_t count);

/// In place: probabilities, and their logarithms.
void softmax(Row scores);
void log_softmax(Row scores);

void keep_top_k(Row scores, std::size_t top_k, std::size_t least);
void keep_top_p(Row scores, double top_p, std::size_t least);
void keep_min_p(Row scores, double min_p, std::size_t least);
void keep_typical_p(Row scores, double typical_p, std::size_t least);

}  // namespace llm2slm::detail

#endif
