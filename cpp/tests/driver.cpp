// Runs what the tests ask for: one JSON object a line on standard input, one on standard output. tests/cpp/test_library.py
// drives it.
#include <iostream>
#include <llm2slm/llm2slm.hpp>
#include <map>
#include <nlohmann/json.hpp>

namespace {

using Json = nlohmann::json;

template <typename T>
void read(const Json& from, const char* name, std::optional<T>& to) {
  if (from.contains(name)) to = from.at(name).get<T>();
}

llm2slm::GenerationOptions options_of(const Json& request) {
  const Json from = request.value("options", Json::object());
  llm2slm::GenerationOptions o;
  read(from, "max_new_tokens", o.max_new_tokens);
  read(from, "min_new_tokens", o.min_new_tokens);
  read(from, "do_sample", o.do_sample);
  read(from, "num_beams", o.num_beams);
  read(from, "num_return_sequences", o.num_return_sequences);
  read(from, "length_penalty", o.length_penalty);
  if (from.contains("early_stopping")) {
    const Json& value = from.at("early_stopping");
    o.early_stopping = value == "never" ? llm2slm::EarlyStopping::never
                       : value.get<bool>() ? llm2slm::EarlyStopping::yes
                                           : llm2slm::EarlyStopping::no;
  }
  read(from, "temperature", o.temperature);
  read(from, "top_k", o.top_k);
  read(from, "top_p", o.top_p);
  read(from, "min_p", o.min_p);
  read(from, "typical_p", o.typical_p);
  read(from, "repetition_penalty", o.repetition_penalty);
  read(from, "no_repeat_ngram_size", o.no_repeat_ngram_size);
  read(from, "bad_words_ids", o.bad_words_ids);
  read(from, "forced_bos_token_id", o.forced_bos_token_id);
  read(from, "forced_eos_token_id", o.forced_eos_token_id);
  read(from, "seed", o.seed);
  o.stop = from.value("stop", std::vector<std::string>{});
  o.output_scores = from.value("output_scores", false);
  return o;
}

llm2slm::DraftOptions draft_options_of(const Json& request) {
  const Json from = request.value("drafts", Json::object());
  llm2slm::DraftOptions o;
  if (from.contains("drafter")) o.drafter = llm2slm::DrafterName::ngram;
  read(from, "verifier", o.verifier);
  read(from, "defer", o.defer);
  read(from, "num_draft_tokens", o.num_draft_tokens);
  return o;
}

// Text, or bytes as a list of numbers where it need not be UTF-8.
std::string bytes_of(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  std::string bytes;
  for (const Json& byte : value) bytes += static_cast<char>(byte.get<int>());
  return bytes;
}

std::vector<std::string> prompts_of(const Json& request) {
  std::vector<std::string> prompts;
  for (const Json& prompt : request.at("prompts")) prompts.push_back(bytes_of(prompt));
  return prompts;
}

llm2slm::PromptOptions prompt_options_of(const Json& request) {
  return {request.value("truncate", false), request.value("batch_size", std::size_t{0}), request.value("split_special_tokens", false)};
}

const char* reason_text(llm2slm::FinishReason reason) { return reason == llm2slm::FinishReason::stop ? "stop" : "length"; }

Json as_json(const llm2slm::Generation& g) {
  const llm2slm::Timings& ms = g.timings_ms;
  return {{"text", g.text},
          {"token_ids", g.token_ids},
          {"finish_reason", reason_text(g.finish_reason)},
          {"prompt_tokens", g.prompt_tokens},
          {"dropped_tokens", g.dropped_tokens},
          {"batch", g.batch},
          {"sequence", g.sequence},
          {"score", g.score ? Json(*g.score) : Json()},
          {"token_logprobs", g.token_logprobs},
          {"drafted_tokens", g.drafted_tokens ? Json(*g.drafted_tokens) : Json()},
          {"accepted_tokens", g.accepted_tokens ? Json(*g.accepted_tokens) : Json()},
          {"timings_ms",
           {{"tokenize", ms.tokenize}, {"encode", ms.encode}, {"project", ms.project}, {"prefill", ms.prefill},
            {"decode", ms.decode}, {"total", ms.total()}}}};
}

Json as_json(const std::vector<llm2slm::Generation>& generations) {
  Json all = Json::array();
  for (const llm2slm::Generation& g : generations) all.push_back(as_json(g));
  return all;
}

class Driver {
 public:
  Json run(const Json& request) {
    const std::string what = request.at("do");
    if (what == "open") return open(request);
    if (what == "close") return pairs_.erase(request.value("pair", 0)) > 0;
    const llm2slm::Pair& pair = pairs_.at(request.value("pair", 0));
    if (what == "generate") {
      return as_json(pair.generate(prompts_of(request), options_of(request), prompt_options_of(request), draft_options_of(request)));
    }
    if (what == "stream") return stream(pair, request);
    if (what == "encode") {
      encodings_.insert_or_assign(request.value("encoding", 0), pair.encode(prompts_of(request), prompt_options_of(request)));
      return true;
    }
    if (what == "load") {
      encodings_.insert_or_assign(request.value("encoding", 0), pair.load_encoding(request.at("path").get<std::string>()));
      return true;
    }
    if (what == "head") {
      pairs_.insert_or_assign(request.at("as").get<int>(), pair.head(request.at("name")));
      return true;
    }
    const llm2slm::Encoding& encoding = encodings_.at(request.value("encoding", 0));
    if (what == "save") return pair.save_encoding(encoding, request.at("path").get<std::string>()), true;
    if (what == "generate_from") return as_json(pair.generate_from(encoding, options_of(request), draft_options_of(request)));
    throw std::invalid_argument("nothing is called " + what);
  }

 private:
  Json open(const Json& request) {
    llm2slm::Options options;
    options.threads = request.value("threads", 0);
    options.head = request.value("head", "");
    options.ort_library = request.value("ort_library", "");
    const std::string part = request.value("part", "pair");
    options.part = part == "reader" ? llm2slm::Part::reader : part == "writer" ? llm2slm::Part::writer : llm2slm::Part::pair;
    llm2slm::Pair pair(request.at("bundle").get<std::string>(), options);
    const Json about{{"name", pair.name()},
                     {"head", pair.head_name()},
                     {"heads", pair.heads()},
                     {"max_prompt_tokens", pair.max_prompt_tokens()},
                     {"runtime_version", pair.runtime_version()},
                     {"version", llm2slm::version()}};
    pairs_.insert_or_assign(request.value("pair", 0), std::move(pair));
    return about;
  }

  static Json stream(const llm2slm::Pair& pair, const Json& request) {
    Json steps = Json::array();
    const std::size_t most = request.value("most", std::size_t{1} << 30);
    const auto take = [&](const llm2slm::Step& step) {
      if (request.value("throw", false)) throw std::runtime_error("the receiver of steps failed");
      steps.push_back({{"token_id", step.token_id},
                       {"text", step.text},
                       {"finish_reason", step.finish_reason ? Json(reason_text(*step.finish_reason)) : Json()},
                       {"logprob", step.logprob ? Json(*step.logprob) : Json()},
                       {"generation", step.generation != nullptr ? as_json(*step.generation) : Json()}});
      return steps.size() < most;
    };
    pair.stream(prompts_of(request).at(0), take, options_of(request), prompt_options_of(request), draft_options_of(request));
    return steps;
  }

  std::map<int, llm2slm::Pair> pairs_;
  std::map<int, llm2slm::Encoding> encodings_;
};

}  // namespace

int main() {
  Driver driver;
  for (std::string line; std::getline(std::cin, line);) {
    Json reply;
    try {
      reply["result"] = driver.run(Json::parse(line));
    } catch (const llm2slm::Error& error) {
      reply["error"] = error.what();
      reply["code"] = static_cast<int>(error.code());
    } catch (const std::bad_alloc&) {
      reply["error"] = "bad_alloc";
      reply["code"] = static_cast<int>(llm2slm::ErrorCode::out_of_memory);
    } catch (const std::exception& error) {
      reply["error"] = error.what();
      reply["code"] = -1;
    }
    std::cout << reply.dump() << std::endl;
  }
}
