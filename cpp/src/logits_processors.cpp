#include "logits_processors.hpp"

#include <algorithm>

#include "error.hpp"

namespace llm2slm::detail {
namespace {

void penalise_seen(Row scores, Ids ids, double penalty) {
  const auto factor = static_cast<float>(penalty);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  for (const std::int64_t id : ids) {
    if (static_cast<std::size_t>(id) >= scores.size) continue;
    float& score = scores[static_cast<std::size_t>(id)];
    score = score < 0 ? score * factor : score / factor;
  }
}

void forbid(Row scores, std::int64_t id) {
  if (static_cast<std::size_t>(id) < scores.size) scores[static_cast<std::size_t>(id)] = kNever;
}

void forbid_repeats(Row scores, const Ids& ids, std::size_t size) {
  if (ids.size() < size) return;
  const auto length = static_cast<std::ptrdiff_t>(size - 1);
  const auto end = ids.end() - length;
  for (auto window = ids.begin(); window + length < ids.end(); ++window) {
    if (std::equal(end, ids.end(), window)) forbid(scores, window[length]);
  }
}

void force(Row scores, std::int64_t id) {
  std::fill(scores.begin(), scores.end(), kNever);
  scores[static_cast<std::size_t>(id)] = 0;
}

}  // namespace

Processors::Processors(const ResolvedOptions& options, const SpecialIds& special_ids, std::size_t num_tokens,
                       std::size_t rows)
    : options_(options), start_(special_ids.decoder_start ? 1 : 0),
      // Beams need one token besides every EOS to continue with.
      least_(options.num_beams > 1 ? std::max<std::size_t>(2, special_ids.eos.size() + 1) : 1),
      ids_(rows, special_ids.decoder_start ? Ids{*special_ids.decoder_start} : Ids{}) {
  for (const std::int64_t id : special_ids.eos) {
    if (id >= 0 && static_cast<std::size_t>(id) < num_tokens) eos_.push_back(id);
  }
  for (const Ids& word : options.bad_words_ids) {
    // A sequence that is just an EOS is ignored, as in transformers.
    const bool is_eos =
        word.size() == 1 && std::find(special_ids.eos.begin(), special_ids.eos.end(), word[0]) != special_ids.eos.end();
    if (!is_eos) words_.push_back(word);
  }
}

bool Processors::idle() const {
  const bool forced = (options_.forced_bos_token_id && start_ + num_generated_ == 1) ||
                      (options_.forced_eos_token_id && static_cast<std::int64_t>(num_generated_) == options_.max_new_tokens - 1);
  return options_.repetition_penalty == 1.0 && options_.no_repeat_ngram_size == 0 && words_.empty() &&
         static_cast<std::int64_t>(num_generated_) >= options_.min_new_tokens && !forced && !options_.do_sample;
}

void Processors::process(std::size_t row, Row scores) const {
  const Ids& ids = ids_[row];
  const auto generated = static_cast<std::int64_t>(num_generated_);
  bool changed = false;
  if (options_.repetition_penalty != 1.0) {
    penalise_seen(scores, ids, options_.repetition_penalty);
    changed = true;
  }
  if (options_.no_repeat_ngram_size > 0) {
    forbid_repeats(scores, ids, static_cast<std::size_t>(options_.no_repeat_ngram_size));
    changed = true;
  }
  changed = forbid_bad_words(scores, ids) || changed;
  if (generated < options_.min_new_tokens) {
    for (const std::int64_t id : eos_) forbid(scores, id);
    changed = true;
  }
  // Without a decoder start token this is the second token, as in transformers.
  if (options_.forced_bos_token_id && ids.size() == 1) {
    force(scores, *options_.forced_bos_token_id);
    changed = true;
  }
  if (options_.forced_eos_token_id && generated == options_.max_new_tokens - 1) {
    force(scores, *options_.forced_eos_token_id);
    changed = true;
  }
  if (changed && std::all_of(scores.begin(), scores.end(), [](float score) { return score == kNever; })) {
    throw failure(ErrorCode::usage,
                  "The generation options exclude every token after " + std::to_string(generated) + " tokens.",
                  {"bad_words_ids: " + std::to_string(options_.bad_words_ids.size()) + " of them",
                   "no_repeat_ngram_size: " + std::to_string(options_.no_repeat_ngram_size)},
                  "exclude fewer tokens");
  }
  if (options_.do_sample) warp(scores);
}

bool Processors::forbid_bad_words(Row scores, const Ids& ids) const {
  for (const Ids& word : words_) {
    const auto before = static_cast<std::ptrdiff_t>(word.size() - 1);
    if (word.size() - 1 > ids.size()) continue;
    if (std::equal(word.begin(), word.begin() + before, ids.end() - before)) forbid(scores, word.back());
  }
  return !words_.empty();
}

void Processors::warp(Row scores) const {
  if (options_.temperature != 1.0) {
    for (float& score : scores) score /= static_cast<float>(options_.temperature);
  }
  if (options_.top_k > 0) keep_top_k(scores, static_cast<std::size_t>(options_.top_k), least_);
  if (options_.top_p < 1.0) keep_top_p(scores, options_.top_p, least_);
  if (options_.min_p > 0) keep_min_p(scores, options_.min_p, least_);
  if (options_.typical_p < 1.0) keep_typical_p(scores, options_.typical_p, least_);
}

Ids Processors::generated(std::size_t row) const {
  return {ids_[row].begin() + static_cast<std::ptrdiff_t>(start_), ids_[row].end()};
}

void Processors::append(const Ids& ids) {
  for (std::size_t row = 0; row < ids_.size(); ++row) ids_[row].push_back(ids[row]);
  ++num_generated_;
}

void Processors::truncate(std::size_t tokens) {
  for (Ids& ids : ids_) ids.resize(start_ + tokens);
  num_generated_ = tokens;
}

void Processors::keep(const std::vector<std::size_t>& rows) {
  std::vector<Ids> selected;
  selected.reserve(rows.size());
  for (const std::size_t row : rows) selected.push_back(ids_[row]);
  ids_ = std::move(selected);
}

}  // namespace llm2slm::detail
