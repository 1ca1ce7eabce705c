// Several threads, one pair: the graphs are loaded once, and every call has its own decoder state.
//
//     LLM2SLM_ORT_LIBRARY=/path/to/libonnxruntime.so.1 build/release/server_threads ../engines/demo 8 200 < prompts.txt
//
// Every thread answers REQUESTS prompts of standard input, each by another way in. All threads must give the same responses.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <llm2slm/llm2slm.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

using Ids = std::vector<std::int64_t>;

// The response to a prompt: even requests use generate, odd ones stream.
Ids answer(const llm2slm::Pair& pair, const std::string& prompt, std::size_t request) {
  if (request % 2 == 0) return pair.generate({prompt})[0].token_ids;
  Ids ids;
  pair.stream(prompt, [&ids](const llm2slm::Step& step) {
    ids.push_back(step.token_id);
    return true;
  });
  return ids;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s BUNDLE THREADS REQUESTS < PROMPTS\n", argv[0]);
    return EXIT_FAILURE;
  }
  const std::size_t threads = std::stoul(argv[2]), requests = std::stoul(argv[3]);
  std::vector<std::string> prompts;
  for (std::string line; std::getline(std::cin, line);) {
    if (!line.empty()) prompts.push_back(line);
  }
  if (prompts.empty()) throw std::runtime_error("There are no prompts on standard input.");

  // One thread inside each operator: the requests are what runs side by side.
  llm2slm::Options options;
  options.threads = 1;
  const llm2slm::Pair pair(argv[1], options);

  std::vector<std::vector<Ids>> answers(threads, std::vector<Ids>(requests));
  std::atomic<std::size_t> tokens{0}, failures{0};
  const auto started = std::chrono::steady_clock::now();
  std::vector<std::thread> running;
  for (std::size_t thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      for (std::size_t request = 0; request < requests; ++request) {
        try {
          answers[thread][request] = answer(pair, prompts[request % prompts.size()], request + thread);
          tokens += answers[thread][request].size();
        } catch (const std::exception& error) {
          std::fprintf(stderr, "%s\n", error.what());
          ++failures;
        }
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();

  std::size_t differing = 0;
  for (const std::vector<Ids>& given : answers) differing += given == answers[0] ? 0 : 1;
  std::printf("%zu threads x %zu requests: %.1f requests/s, %.0f tokens/s, %zu failed, %zu threads differ from the first\n",
              threads, requests, static_cast<double>(threads * requests) / seconds, static_cast<double>(tokens) / seconds,
              failures.load(), differing);
  return failures == 0 && differing == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}
