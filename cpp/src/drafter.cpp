#include "drafter.hpp"

#include <algorithm>
#include <cmath>

#include "draws.hpp"

namespace llm2slm::detail {

std::int64_t verified(const std::vector<float>& scores, const DraftToken& draft, double accept, double redraw) {
  const auto most = static_cast<double>(maximum(scores.data(), scores.size()));
  std::vector<double> wanted;
  double total = 0;
  for (const float score : scores) total += wanted.emplace_back(std::exp(static_cast<double>(score) - most));
  for (double& probability : wanted) probability /= total;
  const auto at = static_cast<std::size_t>(draft.id);
  if (accept * static_cast<double>(draft.distribution[at]) < wanted[at]) return draft.id;
  std::vector<double> residual;
  bool any = false;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    residual.push_back(std::max(wanted[i] - static_cast<double>(draft.distribution[i]), 0.0));
    any = any || residual[i] > 0;
  }
  // Rounding can leave nothing where both distributions are equal.
  return draw(any ? residual : wanted, redraw);
}

std::size_t common_prefix(const Ids& a, const Ids& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace llm2slm::detail
