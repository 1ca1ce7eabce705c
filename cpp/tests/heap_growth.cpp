// Whether memory grows with the number of generations: resident and allocated bytes after a warm-up and after N more.
//
//     heap_growth BUNDLE N < PROMPTS
#include <malloc.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <llm2slm/llm2slm.hpp>

namespace {

struct Memory {
  double resident_mb, allocated_mb;
};

Memory memory_now() {
  std::ifstream file("/proc/self/statm");
  std::size_t pages = 0, resident = 0;
  file >> pages >> resident;
  const struct mallinfo2 heap = mallinfo2();
  return {static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6,
          static_cast<double>(heap.uordblks + heap.hblkhd) / 1e6};
}

// Every way in, in turn.
void generate(const llm2slm::Pair& pair, const std::string& prompt, std::size_t number) {
  llm2slm::GenerationOptions options;
  if (number % 8 == 1) {
    options.num_beams = 4;
    pair.generate({prompt}, options);
  } else if (number % 8 == 3) {
    options.do_sample = true;
    options.seed = number;
    options.num_return_sequences = 2;
    pair.generate({prompt}, options);
  } else if (number % 8 == 5) {
    pair.generate_from(pair.encode({prompt}), options);
  } else if (number % 8 == 7) {
    pair.stream(prompt, [](const llm2slm::Step& step) { return step.token_id != 0; }, options);
  } else {
    pair.generate({prompt}, options);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s BUNDLE N < PROMPTS\n", argv[0]);
    return EXIT_FAILURE;
  }
  std::vector<std::string> prompts;
  for (std::string line; std::getline(std::cin, line);) prompts.push_back(line);
  llm2slm::Options settings;
  settings.threads = 1;
  const llm2slm::Pair pair(argv[1], settings);
  const std::size_t count = std::stoul(argv[2]), warm_up = count / 5;
  for (std::size_t i = 0; i < warm_up; ++i) generate(pair, prompts[i % prompts.size()], i);
  const Memory before = memory_now();
  for (std::size_t i = 0; i < count; ++i) generate(pair, prompts[i % prompts.size()], i);
  const Memory after = memory_now();
  std::printf("{\"generations\": %zu, \"resident_mb\": [%.3f, %.3f], \"allocated_mb\": [%.3f, %.3f]}\n", count,
              before.resident_mb, after.resident_mb, before.allocated_mb, after.allocated_mb);
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}
