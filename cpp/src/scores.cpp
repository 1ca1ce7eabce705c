#include "scores.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace llm2slm::detail {
namespace {

constexpr std::size_t kLanes = 16;  // independent maxima, which a compiler keeps in vector registers

// Replace scores by exp(score - most), and return their sum in float64, which is more exact than numpy's.
double exponentiate(Row scores, float most) {
  double sum = 0;
  for (float& score : scores) {
    score = std::exp(score - most);
    sum += static_cast<double>(score);
  }
  return sum;
}

std::vector<float> probabilities_of(Row scores) {
  std::vector<float> probabilities(scores.begin(), scores.end());
  softmax({probabilities.data(), probabilities.size()});
  return probabilities;
}

// Set all columns but these to minus infinity.
void keep_only(Row scores, const std::vector<bool>& mask) {
  for (std::size_t i = 0; i < scores.size; ++i) {
    if (!mask[i]) scores[i] = kNever;
  }
}

}  // namespace

float maximum(const float* scores, std::size_t size) {
  std::array<float, kLanes> most;
  most.fill(kNever);
  std::array<std::uint32_t, kLanes> nans{};
  // A NaN compares above nothing, so it is searched for separately.
  const auto take = [&](std::size_t lane, float score) {
    most[lane] = score > most[lane] ? score : most[lane];
    nans[lane] |= score != score ? 1U : 0U;
  };
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
#pragma GCC unroll 1  // unrolled, GCC 12 at -O3 keeps the lanes apart: half as fast
    for (std::size_t lane = 0; lane < kLanes; ++lane) take(lane, scores[i + lane]);
  }
  for (; i < size; ++i) take(0, scores[i]);
  const bool any = std::any_of(nans.begin(), nans.end(), [](std::uint32_t there) { return there != 0; });
  return any ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(most.begin(), most.end());
}

std::size_t argmax(const float* scores, std::size_t size) {
  const float most = maximum(scores, size);
  const float* found = std::find_if(scores, scores + size, [most](float s) { return s == most || std::isnan(s); });
  return found == scores + size ? 0 : static_cast<std::size_t>(found - scores);
}

std::vector<std::size_t> highest(const float* scores, std::size_t size, std::size_t count) {
  count = std::min(count, size);
  std::vector<std::size_t> columns;
  if (count == 0) return columns;
  columns.reserve(count + 1);
  for (std::size_t i = 0; i < size; ++i) {
    if (columns.size() == count && !(scores[i] > scores[columns.back()])) continue;
    if (columns.size() == count) columns.pop_back();
    const auto place = std::upper_bound(columns.begin(), columns.end(), scores[i],
                                        [&](float score, std::size_t column) { return score > scores[column]; });
    columns.insert(place, i);
  }
  return columns;
}

void softmax(Row scores) {
  const auto sum = static_cast<float>(exponentiate(scores, maximum(scores.data, scores.size)));
  for (float& score : scores) score /= sum;
}

void log_softmax(Row scores) {
  const float most = maximum(scores.data, scores.size);
  double sum = 0;
  for (float& score : scores) {
    score -= most;
    sum += static_cast<double>(std::exp(score));
  }
  const float logarithm = std::log(static_cast<float>(sum));
  for (float& score : scores) score -= logarithm;
}

void keep_top_k(Row scores, std::size_t top_k, std::size_t least) {
  const std::size_t count = std::min(std::max(top_k, least), scores.size);
  std::vector<float> sorted(scores.begin(), scores.end());
  const auto place = sorted.begin() + static_cast<std::ptrdiff_t>(count - 1);
  std::nth_element(sorted.begin(), place, sorted.end(), std::greater<float>());
  for (float& score : scores) score = score < *place ? kNever : score;
}

void keep_top_p(Row scores, double top_p, std::size_t least) {
  const std::vector<float> probabilities = probabilities_of(scores);
  const double most = 1 - top_p;
  // Sorting dominates the cost. Ids so improbable that together they weigh less than `most` are removed unsorted. The margin
  // covers rounding.
  std::vector<bool> worth(scores.size);
  for (std::size_t i = 0; i < scores.size; ++i) {
    worth[i] = static_cast<double>(probabilities[i]) >= 0.999 * most / static_cast<double>(scores.size);
  }
  if (least > 1) {
    for (const std::size_t column : highest(scores.data, scores.size, least)) worth[column] = true;
  }
  std::vector<std::size_t> columns;
  double rest = 0;
  for (std::size_t i = 0; i < scores.size; ++i) {
    if (worth[i]) {
      columns.push_back(i);
    } else {
      rest += static_cast<double>(probabilities[i]);
    }
  }
  std::stable_sort(columns.begin(), columns.end(), [&](std::size_t a, std::size_t b) { return scores[a] < scores[b]; });
  std::vector<bool> mask(scores.size);
  double cumulative = 0;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    cumulative += static_cast<double>(probabilities[columns[i]]);
    const bool among_last = columns.size() - i <= least;
    mask[columns[i]] = among_last || static_cast<float>(rest + cumulative) > static_cast<float>(most);
  }
  keep_only(scores, mask);
}

void keep_min_p(Row scores, double min_p, std::size_t least) {
  const std::vector<float> probabilities = probabilities_of(scores);
  const float bound = static_cast<float>(min_p) * maximum(probabilities.data(), probabilities.size());
  std::vector<bool> mask(scores.size);
  for (std::size_t i = 0; i < scores.size; ++i) mask[i] = !(probabilities[i] < bound);
  // The likeliest is never below a part of itself.
  if (least > 1) {
    for (const std::size_t column : highest(probabilities.data(), probabilities.size(), least)) mask[column] = true;
  }
  keep_only(scores, mask);
}

void keep_typical_p(Row scores, double typical_p, std::size_t least) {
  std::vector<std::size_t> columns;  // possible ids only: top-k leaves few, and sorting dominates the cost
  std::vector<float> logarithms;
  for (std::size_t i = 0; i < scores.size; ++i) {
    if (scores[i] == kNever) continue;
    columns.push_back(i);
    logarithms.push_back(scores[i]);
  }
  log_softmax({logarithms.data(), logarithms.size()});
  double entropy = 0;
  std::vector<float> probabilities(logarithms.size()), distance(logarithms.size());
  for (std::size_t i = 0; i < logarithms.size(); ++i) {
    probabilities[i] = std::exp(logarithms[i]);
    entropy -= static_cast<double>(logarithms[i] * probabilities[i]);
  }
  for (std::size_t i = 0; i < logarithms.size(); ++i) {
    distance[i] = std::fabs(-logarithms[i] - static_cast<float>(entropy));
  }
  std::vector<std::size_t> order(columns.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return distance[a] < distance[b]; });
  double cumulative = 0;
  std::size_t last = 0;
  for (const std::size_t at : order) {
    cumulative += static_cast<double>(probabilities[at]);
    last += static_cast<float>(cumulative) < static_cast<float>(typical_p) ? 1 : 0;
  }
  const float bound = distance[order[std::min(last, order.size() - 1)]];
  std::vector<bool> mask(scores.size);
  for (std::size_t i = 0; i < order.size(); ++i) mask[columns[order[i]]] = i < least || distance[order[i]] <= bound;
  keep_only(scores, mask);
}

}  // namespace llm2slm::detail
