// Uniform random numbers of a response, by token index: a token's draw does not depend on how the tokens before it were made.
#ifndef LLM2SLM_DRAWS_HPP
#define LLM2SLM_DRAWS_HPP

#include <cstdint>
#include <vector>

#include "random.hpp"

namespace llm2slm::detail {

/// The uniform numbers in [0, 1) of one row.
class Draws {
 public:
  /// key: the seed, and what tells the row's numbers from those of other rows and purposes.
  explicit Draws(const std::vector<std::uint64_t>& key) : random_(key) {}

  /// default_rng(key).random() after `index` numbers.
  double operator[](std::size_t index) {
    while (index >= drawn_.size()) drawn_.push_back(random_.uniform());
    return drawn_[index];
  }

 private:
  Random random_;
  std::vector<double> drawn_;
};

/// The index that a uniform number in [0, 1) selects, by weights that need not add up to 1.
template <typename T>
std::int64_t draw(const std::vector<T>& weights, double uniform) {
  double total = 0, cumulative = 0;
  for (const T weight : weights) total += static_cast<double>(weight);
  std::size_t last = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] > 0)) continue;
    cumulative += static_cast<double>(weights[i]);
    last = i;
    if (cumulative / total > uniform) break;
  }
  return static_cast<std::int64_t>(last);
}

}  // namespace llm2slm::detail

#endif
