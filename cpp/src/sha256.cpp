#include "sha256.hpp"

#include "own_sha256.hpp"

#ifdef LLM2SLM_USE_OPENSSL
#include <openssl/err.h>
#include <openssl/evp.h>

#include <new>

#include "llm2slm/llm2slm.hpp"
#endif

namespace llm2slm::detail {

#ifdef LLM2SLM_USE_OPENSSL
namespace {

using Context = std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)>;

void require(int status) {
  if (status != 1) throw Error(ErrorCode::internal, "OpenSSL failed to compute a SHA-256.");
}

// Null where the host's configuration leaves OpenSSL without SHA-256.
Context new_context() {
  Context context(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  if (context == nullptr) throw std::bad_alloc();
  // The host's queue of OpenSSL errors stays as it is.
  ERR_set_mark();
  if (EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) context.reset();
  ERR_pop_to_mark();
  return context;
}

std::string hex_of(const std::array<std::uint8_t, 32>& digest) {
  std::string text;
  for (const unsigned byte : digest) (text += "0123456789abcdef"[byte >> 4]) += "0123456789abcdef"[byte & 15];
  return text;
}

}  // namespace

struct Sha256::State {
  Context context = new_context();
  OwnSha256 own;  // without a context
};

void Sha256::update(const void* data, std::size_t size) {
  if (state_->context == nullptr) return state_->own.update(data, size);
  require(EVP_DigestUpdate(state_->context.get(), data, size));
}

std::string Sha256::hex() {
  if (state_->context == nullptr) return state_->own.hex();
  std::array<std::uint8_t, 32> digest{};
  require(EVP_DigestFinal_ex(state_->context.get(), digest.data(), nullptr));
  return hex_of(digest);
}

const char* sha256_provider() { return "openssl"; }
#else
struct Sha256::State {
  OwnSha256 own;
};

void Sha256::update(const void* data, std::size_t size) { state_->own.update(data, size); }
std::string Sha256::hex() { return state_->own.hex(); }
const char* sha256_provider() { return "own"; }
#endif

Sha256::Sha256() : state_(std::make_unique<State>()) {}
Sha256::~Sha256() = default;

std::string sha256(std::string_view text) {
  Sha256 digest;
  digest.update(text);
  return digest.hex();
}

}  // namespace llm2slm::detail
