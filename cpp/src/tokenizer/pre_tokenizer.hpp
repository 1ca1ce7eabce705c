// How text is split before the model sees it.
#ifndef LLM2SLM_TOKENIZER_PRE_TOKENIZER_HPP
#define LLM2SLM_TOKENIZER_PRE_TOKENIZER_HPP

#include <memory>

#include "document.hpp"
#include "text.hpp"

namespace llm2slm::detail::tokenizing {

/// A pre-tokenizer of a tokenizer.json; any number of threads may use one.
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  /// Split every piece that is no token.
  virtual void split(Pieces& pieces) const = 0;
  /// Whether it asks pieces if they begin where the original does.
  virtual bool asks_for_start() const { return false; }

  /// Throws Error(bundle) for one that is not known here.
  static std::unique_ptr<PreTokenizer> read(const Part& part);

 protected:
  PreTokenizer() = default;
  PreTokenizer(const PreTokenizer&) = default;
  PreTokenizer& operator=(const PreTokenizer&) = default;
};

/// The fields of Metaspace, which is a pre-tokenizer and a decoder.
struct Metaspace {
  enum class Scheme { first, never, always };

  explicit Metaspace(const Part& part);

  char32_t replacement;
  Scheme scheme = Scheme::always;
  bool split;
};

}  // namespace llm2slm::detail::tokenizing

#endif
