// Milliseconds since construction.
#ifndef LLM2SLM_STOPWATCH_HPP
#define LLM2SLM_STOPWATCH_HPP

#include <chrono>

namespace llm2slm::detail {

class Stopwatch {
 public:
  double ms() const { return std::chrono::duration<double, std::milli>(Clock::now() - started_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point started_ = Clock::now();
};

}  // namespace llm2slm::detail

#endif
