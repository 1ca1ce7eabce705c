#include "manifest_rules.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>

#include "bundle_files.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

using Problems = std::vector<std::string>;

constexpr std::size_t kMostHeads = 256;
constexpr std::size_t kMostEngineSets = 256;
constexpr std::size_t kLongestName = 200;
constexpr std::size_t kLongestTemplate = 100'000;
constexpr std::int64_t kMostLayers = 4'096;
constexpr std::int64_t kMostSize = 1 << 24;  // of a table, or of a tensor's axis
constexpr const char* kPlaceholder = "{prompt}";
constexpr std::array<const char*, 3> kGraphs{"encoder", "projector", "decoder"};

// Checks one head's manifest.
class Rules {
 public:
  Rules(const Manifest& manifest, const std::set<std::string>& listed, std::string before, Problems& problems)
      : manifest_(manifest), listed_(listed), before_(std::move(before)), problems_(problems) {}

  void check() {
    check_name("name", manifest_.name);
    check_name("head", manifest_.head);
    if (manifest_.sources.size() != 2) add("sources", "must be of llm and slm");
    check_template();
    check_listed();
    // Nothing can be checked against invalid sizes.
    if (check_sizes()) {
      check_relations();
      check_ids();
      check_graphs();
    }
    check_engines();
  }

  void check_beside(const std::string& name, const Manifest& first) {
    if (manifest_.head != name) add("head", "must be '" + name + "', got '" + manifest_.head + "'");
    if (name == first.head) add("head", "is the name of the first head");
    const bool digested = manifest_.digest.find_first_not_of('0') != std::string::npos;
    if (!manifest_.heads.empty() || !manifest_.files.empty() || digested) add("heads, files, digest", "are the first head's alone");
    if (!same_encoder(first)) add("graphs.encoder", "is not the first head's");
  }

 private:
  void add(const std::string& field, const std::string& problem) { problems_.push_back(before_ + field + ": " + problem); }

  void check_name(const char* field, const std::string& name) {
    const bool empty = name.find_first_not_of(". ") == std::string::npos;
    if (!empty && code_point_count(name) <= kLongestName && name.find_first_of("/\\") == std::string::npos && is_printable(name)) return;
    add(field, "must be a name of at most " + std::to_string(kLongestName) + " characters without slashes, got " + python_repr(name));
  }

  void check_template() {
    const std::string& text = manifest_.prompt_template;
    const std::string place = kPlaceholder;
    std::size_t count = 0;
    for (std::size_t at = text.find(place); at != std::string::npos; at = text.find(place, at + place.size())) ++count;
    if (count != 1) add("prompt_template", "must hold " + place + " exactly once, it does " + std::to_string(count) + " times");
    const std::size_t length = code_point_count(text);
    if (length > kLongestTemplate) {
      add("prompt_template", "has " + std::to_string(length) + " characters, at most " + std::to_string(kLongestTemplate) + " are read");
    }
  }

  void check_listed() {
    const auto check_file = [this](const std::string& field, const std::string& file) {
      if (const std::string problem = path_problem(file); !problem.empty()) {
        add(field, python_repr(file) + " " + problem);
      } else if (listed_.count(file) == 0) {
        add(field, python_repr(file) + " is not listed in `files`");
      }
    };
    check_file("tokenizer.llm", manifest_.tokenizer.llm);
    check_file("tokenizer.slm", manifest_.tokenizer.slm);
    for (const auto& [name, graph] : manifest_.graphs) {
      const std::string at = "graphs." + name;
      check_file(at + ".file", graph.file);
      for (std::size_t i = 0; i < graph.data.size(); ++i) check_file(at + ".data." + std::to_string(i), graph.data[i]);
      // Runtimes detect other formats by the file's extension.
      const std::string ending = ".onnx";
      const bool ends = graph.file.size() >= ending.size() &&
                        graph.file.compare(graph.file.size() - ending.size(), ending.size(), ending) == 0;
      if (!ends) add(at + ".file", "must end in .onnx, got " + python_repr(graph.file));
    }
    for (const auto& [key, engines] : manifest_.engines) {
      for (const auto& [name, entry] : engines.graphs) check_file("engines." + key + ".graphs." + name + ".file", entry.file);
    }
  }

  bool check_sizes() {
    const PairShape& shape = manifest_.shape;
    const std::size_t before = problems_.size();
    const auto check_size = [this](const char* field, std::int64_t size, std::int64_t most) {
      if (size >= 1 && size <= most) return;
      add(std::string("shape.") + field, "must be from 1 to " + std::to_string(most) + ", got " + std::to_string(size));
    };
    check_size("encoder_hidden_size", shape.encoder_hidden_size, kMostSize);
    check_size("hidden_size", shape.hidden_size, kMostSize);
    check_size("num_hidden_layers", shape.num_hidden_layers, kMostLayers);
    check_size("num_key_value_heads", shape.num_key_value_heads, kMostSize);
    check_size("head_dim", shape.head_dim, kMostSize);
    check_size("vocab_size", shape.vocab_size, kMostSize);
    return problems_.size() == before;
  }

  void check_relations() {
    const PairShape& shape = manifest_.shape;
    if (shape.fusion != manifest_.fusion) add("fusion", "is '" + manifest_.fusion + "', and the shape's is '" + shape.fusion + "'");
    if (manifest_.tokenizer.slm_size > shape.vocab_size) {
      add("tokenizer.slm_size", "is " + std::to_string(manifest_.tokenizer.slm_size) + ", above the vocabulary's " +
                                    std::to_string(shape.vocab_size));
    }
  }

  void check_ids() {
    const SpecialIds& ids = manifest_.special_ids;
    const auto check_below = [this](const std::string& field, const std::vector<std::int64_t>& own, std::int64_t most) {
      const auto beyond = std::find_if(own.begin(), own.end(), [most](std::int64_t id) { return id < 0 || id >= most; });
      if (beyond != own.end()) add(field, "must be an id below " + std::to_string(most) + ", got " + std::to_string(*beyond));
    };
    const auto one = [](const std::optional<std::int64_t>& id) {
      return id ? std::vector<std::int64_t>{*id} : std::vector<std::int64_t>{};
    };
    const std::int64_t vocab = manifest_.shape.vocab_size, num_tokens = manifest_.tokenizer.slm_size;
    check_below("special_ids.pad", {ids.pad}, vocab);
    check_below("special_ids.eos", ids.eos, vocab);
    check_below("special_ids.decoder_start", one(ids.decoder_start), vocab);
    if (!manifest_.shape.decoder_only() && !ids.decoder_start) {
      add("special_ids.decoder_start", "an encoder-decoder SLM has one");
    }
    const GenerationDefaults& generation = manifest_.generation;
    for (const std::vector<std::int64_t>& word : generation.bad_words_ids) {
      check_below("generation.bad_words_ids", word, num_tokens);
    }
    check_below("generation.forced_bos_token_id", one(generation.forced_bos_token_id), num_tokens);
    check_below("generation.forced_eos_token_id", one(generation.forced_eos_token_id), num_tokens);
  }

  // Inputs, outputs and state are those of the contract, for the sizes that the manifest says.
  void check_graphs() {
    bool complete = true;
    for (const char* name : kGraphs) {
      if (manifest_.graphs.count(name) > 0) continue;
      add(std::string("graphs.") + name, "is missing");
      complete = false;
    }
    if (!complete) return;
    const std::string dtype = "float32";  // of keys and values: decoders of float16 are none that this library runs
    for (const char* name : kGraphs) {
      const GraphSpec spec = graph_spec(name, manifest_.shape, dtype);
      const GraphEntry& graph = manifest_.graph(name);
      check_tensors(std::string("graphs.") + name + ".inputs", graph.inputs, spec.inputs);
      check_tensors(std::string("graphs.") + name + ".outputs", graph.outputs, spec.outputs);
    }
    const std::vector<StateSpec> state = state_spec(manifest_.shape, dtype);
    if (manifest_.state.size() != state.size()) {
      add("cache.state", "must have " + std::to_string(state.size()) + " parts, got " + std::to_string(manifest_.state.size()));
      return;
    }
    for (std::size_t i = 0; i < state.size(); ++i) {
      if (manifest_.state[i] == state[i]) continue;
      add("cache.state." + std::to_string(i), "is not that of a decoder of the manifest's shape");
      return;
    }
  }

  void check_tensors(const std::string& at, const std::vector<TensorSpec>& got, const std::vector<TensorSpec>& wanted) {
    if (got.size() != wanted.size()) {
      add(at, "must be " + std::to_string(wanted.size()) + " tensors, got " + std::to_string(got.size()));
      return;
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (got[i] == wanted[i]) continue;
      add(at + "." + std::to_string(i), "must be " + text_of(wanted[i]) + ", got " + text_of(got[i]));
    }
  }

  void check_engines() {
    if (manifest_.engines.size() > kMostEngineSets) {
      add("engines", "there are " + std::to_string(manifest_.engines.size()) + " sets, at most " + std::to_string(kMostEngineSets) +
                         " are read");
    }
    for (const auto& [key, engines] : manifest_.engines) {
      const std::string at = "engines." + key + ".graphs.";
      for (const char* name : kGraphs) {
        if (engines.graphs.count(name) == 0) add(at + name, "is missing");
      }
      for (const auto& [name, entry] : engines.graphs) check_profiles(at + name + ".profiles", entry);
    }
  }

  void check_profiles(const std::string& at, const EngineEntry& entry) {
    std::map<std::string, std::size_t> ranks;
    for (const TensorSpec& tensor : entry.inputs) ranks[tensor.name] = tensor.axes.size();
    for (std::size_t i = 0; i < entry.profiles.size(); ++i) {
      for (const auto& [tensor, bounds] : entry.profiles[i]) {
        const auto rank = ranks.find(tensor);
        const bool fits = rank != ranks.end() && bounds.minimum.size() == rank->second && bounds.optimum.size() == rank->second &&
                          bounds.maximum.size() == rank->second;
        if (!fits) add(at + "." + std::to_string(i) + "." + tensor, "is not of an input's rank");
      }
    }
  }

  bool same_encoder(const Manifest& first) const {
    const auto own = manifest_.graphs.find("encoder"), other = first.graphs.find("encoder");
    if (own == manifest_.graphs.end() || other == first.graphs.end()) {
      return own == manifest_.graphs.end() && other == first.graphs.end();
    }
    return own->second == other->second;
  }

  const Manifest& manifest_;
  const std::set<std::string>& listed_;
  std::string before_;
  Problems& problems_;
};

// A field's exemption depends on the last part of its name.
bool of_template(const std::string& name) {
  const std::size_t dot = name.rfind('.');
  return (dot == std::string::npos ? name : name.substr(dot + 1)) == "prompt_template";
}

void check_text(const std::string& text, const std::string& at, bool exempt, Problems& problems) {
  if (exempt) return;
  if (const std::optional<std::string> found = first_obeyed(text)) problems.push_back(at + ": holds the character '" + *found + "'");
}

void check_texts(const nlohmann::json& value, const std::string& at, bool exempt, Problems& problems) {
  if (value.is_string()) {
    check_text(value.get_ref<const std::string&>(), at, exempt, problems);
  } else if (value.is_array()) {
    for (std::size_t i = 0; i < value.size(); ++i) check_texts(value[i], at + "." + std::to_string(i), false, problems);
  } else if (value.is_object()) {
    for (const auto& [name, item] : value.items()) {
      const std::string place = at.empty() ? name : at + "." + name;
      check_text(name, place, of_template(name), problems);
      check_texts(item, place, of_template(name), problems);
    }
  }
}

}  // namespace

std::vector<std::string> manifest_problems(const Manifest& manifest) {
  Problems problems;
  std::set<std::string> listed;
  for (std::size_t i = 0; i < manifest.files.size(); ++i) {
    const std::string& path = manifest.files[i].path;
    const std::string at = "files." + std::to_string(i) + ".path: " + python_repr(path) + " ";
    if (const std::string problem = path_problem(path); !problem.empty()) problems.push_back(at + problem);
    if (!listed.insert(path).second) problems.push_back(at + "is listed twice");
  }
  Rules(manifest, listed, "", problems).check();
  if (manifest.heads.size() > kMostHeads) {
    problems.push_back("heads: there are " + std::to_string(manifest.heads.size()) + ", at most " + std::to_string(kMostHeads) +
                       " are read");
    return problems;
  }
  for (const auto& [name, head] : manifest.heads) {
    Rules rules(head, listed, "heads." + name + ".", problems);
    rules.check_beside(name, manifest);
    rules.check();
  }
  return problems;
}

std::vector<std::string> text_problems(const nlohmann::json& raw) {
  Problems problems;
  check_texts(raw, "", false, problems);
  return problems;
}

}  // namespace llm2slm::detail
