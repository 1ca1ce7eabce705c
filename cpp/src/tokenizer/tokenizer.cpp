#include "../tokenizer.hpp"

#include <optional>
#include <utility>

#include "../error.hpp"
#include "../regular_file.hpp"
#include "../utf8.hpp"
#include "added_tokens.hpp"
#include "decoder.hpp"
#include "document.hpp"
#include "model.hpp"
#include "normalizer.hpp"
#include "post_processor.hpp"
#include "pre_tokenizer.hpp"

namespace llm2slm::detail {
namespace {

using namespace tokenizing;

constexpr std::uint64_t kMostBytes = 256'000'000;

template <typename Component>
std::unique_ptr<Component> read_component(const Part& document, const char* field) {
  return document.has(field) ? Component::read(document.at(field)) : nullptr;
}

class FileTokenizer : public Tokenizer {
 public:
  FileTokenizer(const Part& document, const nlohmann::json& no_tokens)
      : normalizer_(read_component<Normalizer>(document, "normalizer")),
        pre_tokenizer_(read_component<PreTokenizer>(document, "pre_tokenizer")),
        model_(Model::read(document.at("model"))),
        post_processor_(read_component<PostProcessor>(document, "post_processor")),
        decoder_(read_component<Decoder>(document, "decoder")),
        added_(document.has("added_tokens") ? document.at("added_tokens") : Part(no_tokens, ""), *model_,
               normalizer_.get()),
        tracked_(pre_tokenizer_ && pre_tokenizer_->asks_for_start()) {}

  using Tokenizer::encode;
  Encoded encode(std::string_view utf8, const EncodeOptions& options) const override {
    if (const auto wrong = invalid_utf8(utf8))
      throw failure(ErrorCode::prompt, "The text is not UTF-8", {"at byte " + std::to_string(*wrong)},
                    "Convert it to UTF-8.");
    Encodings encodings;
    std::vector<std::uint32_t>& ids = encodings.runs.emplace_back().ids;
    Pieces pieces = added_.extract(Text(utf8, tracked_), normalizer_.get(), options.split_special_tokens);
    if (pre_tokenizer_) pre_tokenizer_->split(pieces);
    for (const Piece& piece : pieces) {
      if (piece.token)
        ids.push_back(*piece.token);
      else
        model_->tokenize(piece.text.str(), ids);
    }
    if (post_processor_ && options.special_tokens) post_processor_->process(encodings);
    Encoded encoded;
    for (const Encodings::Run& run : encodings.runs) {
      encoded.ids.insert(encoded.ids.end(), run.ids.begin(), run.ids.end());
      if (!run.ids.empty()) encoded.ends_with_special = run.ends_with_special;
    }
    return encoded;
  }

  std::string decode(const std::vector<std::int64_t>& ids) const override {
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (const std::int64_t id : ids) {
      if (id < 0 || id > 0xFFFFFFFF)
        throw failure(ErrorCode::usage, "The token id " + std::to_string(id) + " is out of range", {},
                      "Give ids from 0 to 4294967295.");
      const std::string* token = token_of(id);
      if (token != nullptr && !added_.is_special(*token)) tokens.push_back(*token);
    }
    if (decoder_) decoder_->decode(tokens);
    std::string text;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (i > 0 && !decoder_) text += ' ';
      text += tokens[i];
    }
    return text;
  }

  const std::string* token_of(std::int64_t id) const override {
    if (id < 0 || id > 0xFFFFFFFF) return nullptr;
    const auto number = static_cast<std::uint32_t>(id);
    const std::string* token = added_.token_of(number);
    return token != nullptr ? token : model_->token_of(number);
  }

  std::size_t size() const override { return model_->size() + added_.count_beside(*model_); }

 private:
  std::unique_ptr<const Normalizer> normalizer_;
  std::unique_ptr<const PreTokenizer> pre_tokenizer_;
  std::unique_ptr<const Model> model_;
  std::unique_ptr<const PostProcessor> post_processor_;
  std::unique_ptr<const Decoder> decoder_;
  AddedTokens added_;
  bool tracked_;
};

}  // namespace

std::shared_ptr<const Tokenizer> Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  std::string json;
  try {
    json = RegularFile(tokenizer_json).content(kMostBytes);
  } catch (const FileError& error) {
    throw failure(ErrorCode::bundle, tokenizer_json.string() + " cannot be read.", {error.what()}, "Build the bundle again.");
  }
  return parse(json, tokenizer_json.string());
}

std::shared_ptr<const Tokenizer> Tokenizer::parse(std::string_view json, const std::string& name) {
  const nlohmann::json document = parse_document(json, name);
  const Part part(document, name);
  if (!document.is_object()) throw part.refused("it is not an object");
  if (part.has("version") && part.at("version").text() != "1.0") throw part.at("version").refused("it is not 1.0");
  return std::make_shared<FileTokenizer>(part, nlohmann::json::array());
}

}  // namespace llm2slm::detail
