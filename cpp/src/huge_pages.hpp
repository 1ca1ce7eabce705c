// Huge pages for the memory that a session allocates, where Linux gives them to those who ask. Why:
// llm2slm_export/inference/runtime/onnxruntime/huge_pages.py, which does the same.
#ifndef LLM2SLM_HUGE_PAGES_HPP
#define LLM2SLM_HUGE_PAGES_HPP

#include <cstdint>
#include <utility>
#include <vector>

namespace llm2slm::detail {

/// Moves what is allocated in its lifetime, and still there at its end, into huge pages. A wish: where the system has none to
/// give, all is as it was.
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
