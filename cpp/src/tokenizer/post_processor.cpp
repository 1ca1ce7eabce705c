#include "post_processor.hpp"

#include <optional>
#include <utility>

namespace llm2slm::detail::tokenizing {
namespace {

using Run = Encodings::Run;

class Sequence : public PostProcessor {
 public:
  explicit Sequence(const Part& part) {
    const Part parts = part.at("processors");
    for (std::size_t i = 0; i < parts.size(); ++i) processors_.push_back(read(parts.at(i)));
    bool runs = false;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      // A template makes several runs of one, which a second one would take for a pair of texts.
      const bool is_template = parts.at(i).type() == "TemplateProcessing";
      if (runs && is_template) throw part.refused("it has two templates");
      runs = runs || is_template || parts.at(i).type() == "Sequence";
    }
  }
  void process(Encodings& encodings) const override {
    for (const auto& processor : processors_) processor->process(encodings);
  }

 private:
  std::vector<std::unique_ptr<PostProcessor>> processors_;
};

/// It changes offsets, which are not made here.
class ByteLevel : public PostProcessor {
 public:
  void process(Encodings& /*encodings*/) const override {}
};

/// A token before the text, and one behind it. Further runs are taken for the second text of a pair.
class Ends : public PostProcessor {
 public:
  Ends(const Part& part, bool twice)
      : first_(part.at("cls").at(1).id()), last_(part.at("sep").at(1).id()), twice_(twice) {
    static_cast<void>(part.at("cls").at(std::size_t{0}).text());
    static_cast<void>(part.at("sep").at(std::size_t{0}).text());
  }
  void process(Encodings& encodings) const override {
    for (std::size_t i = 0; i < encodings.runs.size(); ++i) {
      Run& run = encodings.runs[i];
      if (i == 0)
        run.ids.insert(run.ids.begin(), first_);
      else if (twice_)
        run.ids.insert(run.ids.begin(), last_);
      run.ids.push_back(last_);
      run.ends_with_special = true;
    }
  }

 private:
  std::uint32_t first_, last_;
  // RoBERTa has the separator on both sides of a second text.
  bool twice_;
};

class Template : public PostProcessor {
 public:
  explicit Template(const Part& part) {
    const Part pieces = part.at("single");
    const Part tokens = part.at("special_tokens");
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const Part piece = pieces.at(i);
      if (piece.has("Sequence")) {
        if (piece.at("Sequence").at("id").text() != "A") throw piece.refused("one text has no sequence but A");
        pieces_.emplace_back();
        continue;
      }
      const std::string& name = piece.at("SpecialToken").at("id").text();
      const Part ids = tokens.at(name.c_str()).at("ids");
      std::vector<std::uint32_t> added;
      for (std::size_t j = 0; j < ids.size(); ++j) added.push_back(ids.at(j).id());
      pieces_.emplace_back(std::move(added));
    }
  }
  void process(Encodings& encodings) const override {
    Encodings result;
    for (const auto& piece : pieces_) {
      if (!piece)
        result.runs.push_back(encodings.runs.at(0));
      else
        result.runs.push_back({*piece, true});
    }
    encodings = std::move(result);
  }

 private:
  // Nothing: the text.
  std::vector<std::optional<std::vector<std::uint32_t>>> pieces_;
};

}  // namespace

std::unique_ptr<PostProcessor> PostProcessor::read(const Part& part) {
  const std::string type = part.type();
  if (type == "Sequence") return std::make_unique<Sequence>(part);
  if (type == "TemplateProcessing") return std::make_unique<Template>(part);
  if (type == "BertProcessing") return std::make_unique<Ends>(part, false);
  if (type == "RobertaProcessing") return std::make_unique<Ends>(part, true);
  if (type == "ByteLevel") return std::make_unique<ByteLevel>();
  throw part.unknown_type("post-processor");
}

}  // namespace llm2slm::detail::tokenizing
