// SHA-256 of a file by the library's Sha256 and by its own code: two lines `provider digest milliseconds`, in processor time. The
// file is hashed in pieces of PIECE bytes.
//
//     llm2slm_sha256 FILE PIECE
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>

#include "own_sha256.hpp"
#include "sha256.hpp"

namespace {

template <typename Hash>
void print_digest(const char* provider, const std::string& content, std::size_t piece) {
  const std::clock_t start = std::clock();
  Hash hash;
  for (std::size_t at = 0; at < content.size(); at += piece) hash.update(content.data() + at, std::min(piece, content.size() - at));
  const std::string digest = hash.hex();
  const double ms = 1000.0 * static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  std::printf("%s %s %.2f\n", provider, digest.c_str(), ms);
}

}  // namespace

int main(int count, char** arguments) {
  const std::size_t piece = count == 3 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::ifstream stream(count == 3 ? arguments[1] : "", std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  if (piece == 0 || !stream.is_open()) {
    std::fprintf(stderr, "usage: %s FILE PIECE\n", arguments[0]);
    return 2;
  }
  print_digest<llm2slm::detail::Sha256>(llm2slm::detail::sha256_provider(), content, piece);
  print_digest<llm2slm::detail::OwnSha256>("own", content, piece);
}
