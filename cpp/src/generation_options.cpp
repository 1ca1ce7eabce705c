#include "generation_options.hpp"

#include <cmath>
#include <set>
#include <sstream>

#include "error.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

// Digits in threes, as in the Python package's messages.
std::string grouped(std::int64_t number) {
  std::string text = std::to_string(number);
  for (std::size_t at = text.size(); at > 3; at -= 3) text.insert(at - 3, ",");
  return text;
}

// Collects problems. An invalid value is not checked against the other options.
class Checks {
 public:
  void whole(const char* name, std::int64_t value, std::int64_t least, const char* meaning = "") {
    if (value >= least) return;
    refuse(name, "a whole number, at least " + std::to_string(least) + meaning, std::to_string(value));
  }

  void whole(const char* name, std::int64_t value, std::int64_t least, std::int64_t most, const char* meaning = "") {
    if (value >= least && value <= most) return;
    refuse(name, "a whole number, at least " + std::to_string(least) + " and at most " + grouped(most) + meaning,
           std::to_string(value));
  }

  void number(const char* name, double value, bool accepted, const std::string& wanted) {
    if (std::isfinite(value) && accepted) return;
    std::ostringstream got;
    got << value;
    refuse(name, wanted, got.str());
  }

  void refuse(const std::string& name, const std::string& wanted, const std::string& got) {
    wrong_.insert(name);
    problems.push_back(name + ": must be " + wanted + ", got " + got);
  }

  bool fit(std::initializer_list<const char*> names) const {
    for (const char* name : names) {
      if (wrong_.count(name) > 0) return false;
    }
    return true;
  }

  std::vector<std::string> problems;

 private:
  std::set<std::string> wrong_;
};

bool within(double value, double least, double most) { return least <= value && value <= most; }

void check_values(const ResolvedOptions& o, Checks& checks) {
  checks.whole("max_new_tokens", o.max_new_tokens, 1, kMostNewTokens);
  checks.whole("min_new_tokens", o.min_new_tokens, 0);
  checks.whole("num_beams", o.num_beams, 1, kMostRows, " (1: no beam search)");
  checks.whole("num_return_sequences", o.num_return_sequences, 1, kMostRows);
  // The length raised to this power must stay within float32.
  checks.number("length_penalty", o.length_penalty, within(o.length_penalty, -8, 8), "a number from -8 to 8");
  // Beyond these bounds float32 scores overflow or become equal.
  checks.number("temperature", o.temperature, o.temperature == 0 || within(o.temperature, 1e-6, 1e6),
                "a number from 1e-6 to 1e6");
  checks.whole("top_k", o.top_k, 0, " (0: no limit)");
  checks.number("top_p", o.top_p, within(o.top_p, 0, 1), "a number from 0 to 1");
  checks.number("min_p", o.min_p, within(o.min_p, 0, 1), "a number from 0 to 1");
  checks.number("typical_p", o.typical_p, within(o.typical_p, 0, 1) && o.typical_p > 0,
                "a number above 0, at most 1 (1: no limit)");
  checks.number("repetition_penalty", o.repetition_penalty, within(o.repetition_penalty, 1e-6, 1e6),
                "a number from 1e-6 to 1e6 (1: no penalty)");
  checks.whole("no_repeat_ngram_size", o.no_repeat_ngram_size, 0, " (0: no limit)");
  for (const std::vector<std::int64_t>& word : o.bad_words_ids) {
    bool accepted = !word.empty();
    for (const std::int64_t id : word) accepted = accepted && id >= 0;
    if (!accepted) {
      checks.refuse("bad_words_ids", "non-empty sequences of token ids", "one of " + std::to_string(word.size()));
      break;
    }
  }
  if (o.forced_bos_token_id.value_or(0) < 0) {
    checks.refuse("forced_bos_token_id", "a token id", std::to_string(*o.forced_bos_token_id));
  }
  if (o.forced_eos_token_id.value_or(0) < 0) {
    checks.refuse("forced_eos_token_id", "a token id", std::to_string(*o.forced_eos_token_id));
  }
  for (const std::string& text : o.stop) {
    if (text.empty() || invalid_utf8(text)) {
      checks.refuse("stop", "non-empty strings in UTF-8", text.empty() ? "''" : "one that is not UTF-8");
      break;
    }
  }
}

void check_contradictions(const ResolvedOptions& o, Checks& checks) {
  if (checks.fit({"min_new_tokens", "max_new_tokens"}) && o.min_new_tokens > o.max_new_tokens) {
    checks.problems.push_back("min_new_tokens: " + std::to_string(o.min_new_tokens) + " is above max_new_tokens, " +
                              std::to_string(o.max_new_tokens));
  }
  if (checks.fit({"temperature"}) && o.do_sample && o.temperature == 0) {
    checks.problems.emplace_back("temperature: must be above 0 to sample, got 0; do_sample=false is greedy");
  }
  if (checks.fit({"num_return_sequences", "num_beams"}) && o.num_return_sequences > o.num_beams &&
      (o.num_beams > 1 || !o.do_sample)) {
    const std::string several = o.num_beams == 1 ? "sampling" : "as many beams, or sampling without beams";
    checks.problems.push_back("num_return_sequences: " + std::to_string(o.num_return_sequences) + " is above num_beams, " +
                              std::to_string(o.num_beams) + "; use " + several);
  }
}

void check_effect(const ResolvedOptions& o, const GenerationOptions& given, Checks& checks) {
  const auto without = [&checks](bool is_given, const char* name, const char* condition) {
    if (is_given && checks.fit({name})) {
      checks.problems.push_back(std::string(name) + ": has no effect without " + condition);
    }
  };
  if (!o.do_sample) {
    without(given.temperature.has_value(), "temperature", "do_sample=true");
    without(given.top_k.has_value(), "top_k", "do_sample=true");
    without(given.top_p.has_value(), "top_p", "do_sample=true");
    without(given.min_p.has_value(), "min_p", "do_sample=true");
    without(given.typical_p.has_value(), "typical_p", "do_sample=true");
    without(given.seed.has_value(), "seed", "do_sample=true");
  }
  if (o.num_beams == 1) {
    without(given.length_penalty.has_value(), "length_penalty", "num_beams above 1");
    without(given.early_stopping.has_value(), "early_stopping", "num_beams above 1");
  }
}

void check_ids(const ResolvedOptions& o, std::int64_t num_tokens) {
  std::set<std::int64_t> words;
  for (const std::vector<std::int64_t>& word : o.bad_words_ids) words.insert(word.begin(), word.end());
  std::vector<std::string> problems;
  const auto name_beyond = [&](const std::string& name, const std::set<std::int64_t>& ids) {
    std::string beyond;
    for (const std::int64_t id : ids) {
      if (id >= num_tokens) beyond += (beyond.empty() ? "" : ", ") + std::to_string(id);
    }
    if (!beyond.empty()) problems.push_back(name + ": " + beyond);
  };
  name_beyond("bad_words_ids", words);
  if (o.forced_bos_token_id) name_beyond("forced_bos_token_id", {*o.forced_bos_token_id});
  if (o.forced_eos_token_id) name_beyond("forced_eos_token_id", {*o.forced_eos_token_id});
  if (!problems.empty()) {
    throw failure(ErrorCode::usage, "These generation options have token ids outside the vocabulary.", problems,
                  "give ids below " + std::to_string(num_tokens));
  }
}

}  // namespace

ResolvedOptions resolve_options(const GenerationDefaults& defaults, const GenerationOptions& given, std::int64_t num_tokens) {
  ResolvedOptions o{defaults, given.seed, given.stop, given.output_scores};
  Checks checks;
  o.max_new_tokens = given.max_new_tokens.value_or(o.max_new_tokens);
  o.min_new_tokens = given.min_new_tokens.value_or(o.min_new_tokens);
  o.do_sample = given.do_sample.value_or(o.do_sample);
  o.num_beams = given.num_beams.value_or(o.num_beams);
  o.num_return_sequences = given.num_return_sequences.value_or(o.num_return_sequences);
  o.length_penalty = given.length_penalty.value_or(o.length_penalty);
  o.early_stopping = given.early_stopping.value_or(o.early_stopping);
  o.temperature = given.temperature.value_or(o.temperature);
  o.top_k = given.top_k.value_or(o.top_k);
  o.top_p = given.top_p.value_or(o.top_p);
  o.min_p = given.min_p.value_or(o.min_p);
  o.typical_p = given.typical_p.value_or(o.typical_p);
  o.repetition_penalty = given.repetition_penalty.value_or(o.repetition_penalty);
  o.no_repeat_ngram_size = given.no_repeat_ngram_size.value_or(o.no_repeat_ngram_size);
  if (given.bad_words_ids) o.bad_words_ids = *given.bad_words_ids;
  if (given.forced_bos_token_id) o.forced_bos_token_id = given.forced_bos_token_id;
  if (given.forced_eos_token_id) o.forced_eos_token_id = given.forced_eos_token_id;
  check_values(o, checks);
  check_contradictions(o, checks);
  check_effect(o, given, checks);
  if (!checks.problems.empty()) {
    throw failure(ErrorCode::usage, "These generation options cannot be used.", checks.problems,
                  "fix or remove these options");
  }
  check_ids(o, num_tokens);
  return o;
}

}  // namespace llm2slm::detail
