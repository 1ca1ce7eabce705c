// One tokenizer used by eight threads at once: each must find the same as one thread alone. Meant for the thread
// sanitizer.
//
//     tokenizer_threads tokenizer.json [rounds] < lines
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "tokenizer.hpp"

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::cerr << "usage: tokenizer_threads tokenizer.json [rounds] < lines\n";
    return 2;
  }
  const auto tokenizer = llm2slm::detail::Tokenizer::load(argv[1]);
  const int rounds = argc > 2 ? std::max(1, std::atoi(argv[2])) : 1;
  std::vector<std::string> lines;
  for (std::string line; std::getline(std::cin, line);) lines.push_back(line);
  if (lines.empty()) {
    std::cerr << "no lines\n";
    return 2;
  }
  std::vector<std::vector<std::int64_t>> ids;
  std::vector<std::string> texts;
  for (const std::string& line : lines) {
    ids.push_back(tokenizer->encode(line).ids);
    texts.push_back(tokenizer->decode(ids.back()));
  }
  std::atomic<std::size_t> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t first = 0; first < 8; ++first) {
    threads.emplace_back([&, first] {
      for (int round = 0; round < rounds; ++round) {
        // Each begins elsewhere, so that different texts meet.
        for (std::size_t i = 0; i < lines.size(); ++i) {
          const std::size_t at = (i + first * lines.size() / 8) % lines.size();
          try {
            if (tokenizer->encode(lines[at]).ids != ids[at] || tokenizer->decode(ids[at]) != texts[at]) ++wrong;
          } catch (const std::exception&) {
            ++wrong;
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::cout << lines.size() << " lines, 8 threads, " << wrong << " different\n";
  return wrong == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
