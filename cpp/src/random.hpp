// numpy's random numbers: default_rng([a, b, …]) of the same words draws the same. SeedSequence (O'Neill's seed_seq_fe),
// PCG64 (XSL-RR 128/64), 53-bit doubles and exponentials by Marsaglia and Tsang's ziggurat of 256 layers.
#ifndef LLM2SLM_RANDOM_HPP
#define LLM2SLM_RANDOM_HPP

#include <cstdint>
#include <vector>

namespace llm2slm::detail {

class Random {
 public:
  /// default_rng(words).
  explicit Random(const std::vector<std::uint64_t>& words);
  /// Generator.random(): uniform in [0, 1).
  double uniform();
  /// Generator.standard_exponential().
  double exponential();

 private:
  std::uint64_t next();

  // PCG64's state and increment are numbers of 128 bits.
  __extension__ typedef unsigned __int128 Wide;
  Wide state_ = 0, increment_ = 0;
};

}  // namespace llm2slm::detail

#endif
