#include "huge_pages.hpp"

#ifdef __linux__

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace llm2slm::detail {
namespace {

constexpr const char* kSettings = "/sys/kernel/mm/transparent_hugepage/";
constexpr int kCollapse = 25;  // MADV_COLLAPSE: Linux 6.1's, younger than many a header
// Minimum resident share of a mapping. Stacks are mostly empty, and huge pages would fill them.
constexpr double kResident = 0.9;

struct Mapping {
  std::uintptr_t start, end, resident;
};

std::string setting(const char* name) {
  std::ifstream file(std::string(kSettings) + name);
  std::string line;
  std::getline(file, line);
  return line;
}

/// The process's private memory that is no file's, in order.
std::vector<Mapping> mappings() {
  std::vector<Mapping> found;
  std::ifstream file("/proc/self/smaps");
  bool own = false;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first;
    words >> first;
    const std::size_t dash = first.find('-');
    if (first == "Rss:") {
      std::uintptr_t kilobytes = 0;
      if (own && words >> kilobytes) found.back().resident = kilobytes * 1024;
    } else if (dash != std::string::npos && first.back() != ':') {
      std::string access, offset, device, inode, name;
      words >> access >> offset >> device >> inode >> name;
      own = access == "rw-p" && inode == "0" && (name.empty() || name == "[heap]" || name.rfind("[anon", 0) == 0);
      if (own) found.push_back({std::stoull(first, nullptr, 16), std::stoull(first.substr(dash + 1), nullptr, 16), 0});
    }
  }
  return found;
}

}  // namespace

HugePages::HugePages() noexcept {
  try {
    if (setting("enabled").find("[never]") != std::string::npos) return;
    const std::string size = setting("hpage_pmd_size");
    if (size.empty()) return;
    for (const Mapping& mapping : mappings()) before_.emplace_back(mapping.start, mapping.end);
    size_ = std::stoull(size);
  } catch (...) {
    size_ = 0;  // best effort
  }
}

HugePages::~HugePages() {
  if (size_ == 0) return;
  try {
    for (const Mapping& mapping : mappings()) {
      if (static_cast<double>(mapping.resident) < kResident * static_cast<double>(mapping.end - mapping.start)) continue;
      // The gaps between the earlier mappings, which are in order.
      std::uintptr_t start = mapping.start;
      for (const auto& [low, high] : before_) {
        if (high <= start || low >= mapping.end) continue;
        ask(start, low);
        start = std::max(start, high);
      }
      ask(start, mapping.end);
    }
  } catch (...) {  // best effort
  }
}

void HugePages::ask(std::uintptr_t start, std::uintptr_t end) const noexcept {
  const std::uintptr_t first = (start + size_ - 1) / size_ * size_, last = end / size_ * size_;
  if (first >= last) return;
  for (const int advice : {MADV_HUGEPAGE, kCollapse})
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, advice));
}

}  // namespace llm2slm::detail

#else

namespace llm2slm::detail {

HugePages::HugePages() noexcept = default;
HugePages::~HugePages() = default;

}  // namespace llm2slm::detail

#endif
