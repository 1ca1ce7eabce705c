// What is added to the ids of a text: tokens for its beginning and end.
#ifndef LLM2SLM_TOKENIZER_POST_PROCESSOR_HPP
#define LLM2SLM_TOKENIZER_POST_PROCESSOR_HPP

#include <cstdint>
#include <memory>
#include <vector>

#include "document.hpp"

namespace llm2slm::detail::tokenizing {

/// Ids in a row, and whether the last of them was added as a special token.
struct Encodings {
  struct Run {
    std::vector<std::uint32_t> ids;
    bool ends_with_special = false;
  };
  std::vector<Run> runs;
};

/// A post-processor of a tokenizer.json; any number of threads may use one.
class PostProcessor {
 public:
  virtual ~PostProcessor() = default;
  virtual void process(Encodings& encodings) const = 0;

  /// Throws Error(bundle) for one that is not known here.
  static std::unique_ptr<PostProcessor> read(const Part& part);

 protected:
  PostProcessor() = default;
  PostProcessor(const PostProcessor&) = default;
  PostProcessor& operator=(const PostProcessor&) = default;
};

}  // namespace llm2slm::detail::tokenizing

#endif
