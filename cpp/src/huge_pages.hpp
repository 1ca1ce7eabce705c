// Huge pages for a session's memory on Linux, requested with madvise. Reasons and measurements:
// inference/runtime/onnxruntime/huge_pages.py in the Python package, which does the same.
#ifndef LLM2SLM_HUGE_PAGES_HPP
#define LLM2SLM_HUGE_PAGES_HPP

#include <cstdint>
#include <utility>
#include <vector>

namespace llm2slm::detail {

/// Moves memory that is allocated in its lifetime and still held at its end into huge pages. Best effort: if the system refuses,
/// nothing changes.
class HugePages {
 public:
  HugePages() noexcept;
  ~HugePages();
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

 private:
  using Interval = std::pair<std::uintptr_t, std::uintptr_t>;
  void ask(std::uintptr_t start, std::uintptr_t end) const noexcept;
  std::uintptr_t size_ = 0;  // of a huge page, in bytes; 0: there are none
  std::vector<Interval> before_;
};

}  // namespace llm2slm::detail

#endif
