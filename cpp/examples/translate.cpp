// Translate one text with a bundle, token by token.
//
//     cmake --preset release -DLLM2SLM_ORT_INCLUDE_DIR=DIR/include && cmake --build --preset release
//     LLM2SLM_ORT_LIBRARY=/path/to/libonnxruntime.so.1 build/release/translate ../engines/demo "How are you?"
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <llm2slm/llm2slm.hpp>

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s BUNDLE PROMPT\n", argv[0]);
    return EXIT_FAILURE;
  }
  const llm2slm::Pair pair(argv[1]);
  llm2slm::Generation response;
  pair.stream(argv[2], [&response](const llm2slm::Step& step) {
    std::fputs(step.text.c_str(), stdout);
    std::fflush(stdout);
    if (step.generation != nullptr) response = *step.generation;
    return true;
  });
  std::putchar('\n');
  const llm2slm::Timings& ms = response.timings_ms;
  const std::size_t tokens = response.token_ids.size();
  std::fprintf(stderr, "read %zu tokens in %.1f ms, wrote %zu in %.1f ms: %.0f tokens/s\n", response.prompt_tokens,
               ms.tokenize + ms.encode + ms.project, tokens, ms.prefill + ms.decode,
               1e3 * static_cast<double>(tokens) / (ms.prefill + ms.decode));
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  // One line: the fact. What follows it in the message is evidence and remedy.
  const std::string message = error.what();
  std::fprintf(stderr, "%s\n", message.substr(0, message.find('\n')).c_str());
  return EXIT_FAILURE;
}
