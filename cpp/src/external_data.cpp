#include "external_data.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

// As in bundle/external_data.py.
constexpr std::size_t kDeepest = 64;
constexpr std::size_t kMostFields = 20'000'000;
constexpr std::uint64_t kLongestName = 4096;
// More than a manifest has room to list.
constexpr std::size_t kMostNames = 100'000;
constexpr std::string_view kLocation = "location";
constexpr std::size_t kWindow = 1 << 16;

enum class Message { model, training, graph, function, node, attribute, sparse_tensor, tensor, entry };

// Which fields hold which messages: onnx.proto's field numbers. Fields that are not listed lead to no tensor.
struct Child {
  Message in;
  std::uint64_t field;
  Message of;
};
constexpr std::array<Child, 20> kChildren{{
    {Message::model, 7, Message::graph},
    {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},
    {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},
    {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},
    {Message::graph, 15, Message::sparse_tensor},
    {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute},
    {Message::node, 5, Message::attribute},
    {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},
    {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},
    {Message::attribute, 22, Message::sparse_tensor},
    {Message::attribute, 23, Message::sparse_tensor},
    {Message::sparse_tensor, 1, Message::tensor},
    {Message::sparse_tensor, 2, Message::tensor},
    {Message::tensor, 13, Message::entry},
}};

// A file's bytes, a window at a time.
class Bytes {
 public:
  explicit Bytes(const RegularFile& file) : file_(file), window_(kWindow) {}

  std::uint8_t at(std::uint64_t offset) {
    if (offset < first_ || offset - first_ >= held_) {
      first_ = offset;
      held_ = file_.read(offset, window_.data(), window_.size());
      if (held_ == 0) throw OnnxError("it is cut off");
    }
    return window_[static_cast<std::size_t>(offset - first_)];
  }

  std::string text(std::uint64_t offset, std::uint64_t size) {
    std::string found;
    for (std::uint64_t i = 0; i < size; ++i) found += static_cast<char>(at(offset + i));
    return found;
  }

 private:
  const RegularFile& file_;
  std::vector<std::uint8_t> window_;
  std::uint64_t first_ = 0;
  std::size_t held_ = 0;
};

class Walk {
 public:
  explicit Walk(const RegularFile& file) : bytes_(file) {}

  void message(Message kind, std::uint64_t at, std::uint64_t end, std::size_t depth) {
    if (depth > kDeepest) throw OnnxError("it is nested more than " + std::to_string(kDeepest) + " levels deep");
    std::string key, value;
    while (at < end) {
      if (++fields_ > kMostFields) throw OnnxError("it has more than " + std::to_string(kMostFields) + " fields");
      const std::uint64_t tag = varint(at, end);
      const std::uint64_t field = tag >> 3;
      if (field == 0 || field >= 1U << 29) throw OnnxError("it is not protobuf: it has field number " + std::to_string(field));
      const std::uint64_t size = content_size(tag & 7, at, end);
      if (size > end - at) throw OnnxError("it is not protobuf: a field is longer than what holds it");
      if ((tag & 7) == 2) {
        // No standard key is as long, so the beginning is enough.
        if (kind == Message::entry && field == 1) key = bytes_.text(at, std::min<std::uint64_t>(size, kLocation.size() + 1));
        if (kind == Message::entry && field == 2) value = name(at, size);
        for (const Child& child : kChildren) {
          if (child.in == kind && child.field == field) message(child.of, at, at + size, depth + 1);
        }
      }
      at += size;
    }
    if (key != kLocation) return;
    locations_.insert(value);
    if (locations_.size() > kMostNames) throw OnnxError("it names more than " + std::to_string(kMostNames) + " files");
  }

  std::set<std::string> locations() && { return std::move(locations_); }

 private:
  std::uint64_t varint(std::uint64_t& at, std::uint64_t end) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift <= 63; shift += 7) {
      if (at >= end) throw OnnxError("it is cut off");
      const std::uint8_t byte = bytes_.at(at++);
      // Values beyond 64 bits saturate: they are above all bounds.
      if (shift == 63 && (byte & 0x7e) != 0) value = std::numeric_limits<std::uint64_t>::max();
      value |= std::uint64_t{byte & 0x7fU} << shift;
      if (byte < 0x80) return value;
    }
    throw OnnxError("it is not protobuf: a number has more than ten bytes");
  }

  // The size of a field's content after the tag, and after the length if it has one.
  std::uint64_t content_size(std::uint64_t type, std::uint64_t& at, std::uint64_t end) {
    switch (type) {
      case 0:
        varint(at, end);
        return 0;
      case 1:
        return 8;
      case 2:
        return varint(at, end);
      case 5:
        return 4;
      default:
        throw OnnxError("it is not protobuf: it has a field of an unknown type");
    }
  }

  std::string name(std::uint64_t at, std::uint64_t size) {
    if (size > kLongestName) throw OnnxError("it names a file with " + std::to_string(size) + " bytes");
    std::string text = bytes_.text(at, size);
    if (invalid_utf8(text)) throw OnnxError("it names a file by bytes that are not UTF-8");
    return text;
  }

  Bytes bytes_;
  std::size_t fields_ = 0;
  std::set<std::string> locations_;
};

}  // namespace

std::set<std::string> external_data(const RegularFile& model) {
  if (model.size() == 0) throw OnnxError("it is empty");
  Walk walk(model);
  walk.message(Message::model, 0, model.size(), 0);
  return std::move(walk).locations();
}

}  // namespace llm2slm::detail
