// Encodes the texts on standard input, each ended by a NUL or the end of input, and decodes what came of them.
//
//     tokenize tokenizer.json [--time] [--split] [--plain] < texts > results.jsonl
//
// Writes one JSON object a text: {"ids": [...], "text": "...", "special": true}, the last of which says whether the
// post-processor added the last id; or {"error": "..."}. With --time, the seconds that encoding and decoding took on
// standard error. --split takes special tokens for text; --plain adds none. Texts may hold NUL as U+2400 doubled: "␀␀".
#include <chrono>
#include <cstring>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace {

std::vector<std::string> texts_of(std::istream& input) {
  const std::string all{std::istreambuf_iterator<char>(input), std::istreambuf_iterator<char>()};
  std::vector<std::string> texts;
  const std::string mark = "\xE2\x90\x80\xE2\x90\x80";
  for (std::size_t begin = 0; begin < all.size();) {
    const std::size_t end = std::min(all.find('\0', begin), all.size());
    std::string text = all.substr(begin, end - begin);
    for (std::size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + 1))
      text.replace(at, mark.size(), 1, '\0');
    texts.push_back(std::move(text));
    begin = end + 1;
  }
  return texts;
}

struct Result {
  std::string text, error;
  llm2slm::detail::Encoded encoded;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::cerr << "usage: tokenize tokenizer.json [--time] < texts\n";
    return 2;
  }
  llm2slm::detail::EncodeOptions options;
  bool timed = false;
  for (int i = 2; i < argc; ++i) {
    timed = timed || std::strcmp(argv[i], "--time") == 0;
    if (std::strcmp(argv[i], "--split") == 0) options.split_special_tokens = true;
    if (std::strcmp(argv[i], "--plain") == 0) options.special_tokens = false;
  }
  const auto tokenizer = llm2slm::detail::Tokenizer::load(argv[1]);
  const std::vector<std::string> texts = texts_of(std::cin);
  std::vector<Result> results(texts.size());
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (std::size_t i = 0; i < texts.size(); ++i) {
    try {
      results[i].encoded = tokenizer->encode(texts[i], options);
    } catch (const std::exception& error) {
      results[i].error = error.what();
    }
  }
  const auto encoded = Clock::now();
  for (Result& result : results) {
    if (!result.error.empty()) continue;
    try {
      result.text = tokenizer->decode(result.encoded.ids);
    } catch (const std::exception& error) {
      result.error = error.what();
    }
  }
  const auto decoded = Clock::now();
  for (const Result& result : results) {
    nlohmann::json line;
    if (!result.error.empty())
      line = {{"error", result.error}};
    else
      line = {{"ids", result.encoded.ids}, {"text", result.text}, {"special", result.encoded.ends_with_special}};
    std::cout << line.dump() << '\n';
  }
  if (timed) {
    const auto seconds = [](Clock::duration duration) { return std::chrono::duration<double>(duration).count(); };
    std::cerr << nlohmann::json{{"encode", seconds(encoded - start)},
                                {"decode", seconds(decoded - encoded)},
                                {"size", tokenizer->size()}}
              << '\n';
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
