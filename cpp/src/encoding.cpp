#include "encoding.hpp"

namespace llm2slm {

Encoding::Encoding(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
Encoding::Encoding(const Encoding&) = default;
Encoding::Encoding(Encoding&&) noexcept = default;
Encoding& Encoding::operator=(const Encoding&) = default;
Encoding& Encoding::operator=(Encoding&&) noexcept = default;
Encoding::~Encoding() = default;

std::size_t Encoding::size() const noexcept { return data_->conditioning.prompt_tokens.size(); }
const std::vector<std::size_t>& Encoding::prompt_tokens() const noexcept { return data_->conditioning.prompt_tokens; }
const std::vector<std::size_t>& Encoding::dropped_tokens() const noexcept { return data_->dropped_tokens; }
const Timings& Encoding::timings_ms() const noexcept { return data_->timings_ms; }

}  // namespace llm2slm
