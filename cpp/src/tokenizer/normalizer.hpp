// What is done to text before it is split.
#ifndef LLM2SLM_TOKENIZER_NORMALIZER_HPP
#define LLM2SLM_TOKENIZER_NORMALIZER_HPP

#include <memory>

#include "document.hpp"
#include "text.hpp"

namespace llm2slm::detail::tokenizing {

/// A normalizer of a tokenizer.json; any number of threads may use one.
class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void normalize(Text& text) const = 0;

  /// Throws Error(bundle) for one that is not known here.
  static std::unique_ptr<Normalizer> read(const Part& part);

 protected:
  Normalizer() = default;
  Normalizer(const Normalizer&) = default;
  Normalizer& operator=(const Normalizer&) = default;
};

/// `precompiled_charsmap` of SentencePiece: a trie that maps text to other text.
std::unique_ptr<Normalizer> read_precompiled(const Part& part);

/// NFC, NFD, NFKC and NFKD.
class Form : public Normalizer {
 public:
  Form(bool composed, bool compatible) : composed_(composed), compatible_(compatible) {}
  void normalize(Text& text) const override;

 private:
  bool composed_, compatible_;
};

}  // namespace llm2slm::detail::tokenizing

#endif
