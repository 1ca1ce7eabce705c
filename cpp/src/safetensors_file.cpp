#include "safetensors_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "bounded_json.hpp"
#include "error.hpp"
#include "regular_file.hpp"
#include "sha256.hpp"
#include "utf8.hpp"

namespace llm2slm::detail {
namespace {

using Json = nlohmann::json;

constexpr const char* kChecksum = "sha256";
constexpr const char* kMetadata = "__metadata__";
constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kMostHeader = 4'000'000;
constexpr std::size_t kMostAxes = 8;
constexpr std::uint64_t kMostFile = 1ULL << 32;

static_assert(sizeof(float) == 4, "safetensors' F32");

Error unreadable(const std::string& name, const std::string& reason) {
  return failure(ErrorCode::encoding, name + " cannot be read as an encoding.", {reason}, "copy it again, or encode again");
}

// JSON as the Python package's checksum has it: sorted keys, no spaces, ASCII only.
std::string canonical(const Json& value) { return value.dump(-1, ' ', true); }

std::string checksum(const std::map<std::string, TensorView>& tensors, const About& about) {
  Sha256 digest;
  digest.update(canonical(Json(about)));
  for (const auto& [name, tensor] : tensors) {
    digest.update(canonical(Json::array({name, tensor.is_float ? "float32" : "int64", tensor.shape})));
    digest.update(tensor.data, tensor.bytes);
  }
  return digest.hex();
}

Error invalid_shape(const std::string& name, const std::string& tensor) {
  return unreadable(name, "the tensor " + python_repr(tensor) + " has an invalid shape");
}

// The size of a tensor in bytes.
std::size_t tensor_bytes(const TensorView& tensor, const std::string& name, const std::string& key) {
  std::size_t bytes = tensor.is_float ? 4 : 8;
  for (const std::int64_t size : tensor.shape) {
    const auto factor = static_cast<std::size_t>(size);
    if (size < 0 || (factor != 0 && bytes > std::numeric_limits<std::size_t>::max() / factor)) {
      throw invalid_shape(name, key);
    }
    bytes *= factor;
  }
  return bytes;
}

TensorView parse_tensor(const Json& entry, std::string_view data, const std::string& name, const std::string& key) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets")) {
    throw unreadable(name, "its header does not describe tensors");
  }
  TensorView tensor;
  const Json& dtype = entry["dtype"];
  if (dtype != "F32" && dtype != "I64") throw unreadable(name, "it holds tensors of type " + dtype.dump());
  tensor.is_float = dtype == "F32";
  const auto whole = [](const Json& value) { return value.is_number_unsigned() && value.get<std::uint64_t>() < (1ULL << 62); };
  const auto size_of_axis = [](const Json& value) { return value.is_number_unsigned() && value.get<std::uint64_t>() < (1ULL << 31); };
  const Json &shape = entry["shape"], &offsets = entry["data_offsets"];
  if (!shape.is_array() || shape.size() > kMostAxes || !std::all_of(shape.begin(), shape.end(), size_of_axis)) {
    throw invalid_shape(name, key);
  }
  if (!offsets.is_array() || offsets.size() != 2 || !whole(offsets[0]) || !whole(offsets[1])) {
    throw unreadable(name, "its header does not describe tensors");
  }
  for (const Json& size : shape) tensor.shape.push_back(size.get<std::int64_t>());
  const auto first = offsets[0].get<std::size_t>(), end = offsets[1].get<std::size_t>();
  tensor.bytes = tensor_bytes(tensor, name, key);
  if (first > end || end > data.size() || end - first != tensor.bytes) {
    throw unreadable(name, "a tensor's offsets are " + std::to_string(first) + " to " + std::to_string(end) + " of " +
                               std::to_string(data.size()));
  }
  tensor.data = data.data() + first;
  return tensor;
}

// Every byte belongs to one tensor, as safetensors demands.
void check_cover(const std::map<std::string, TensorView>& tensors, std::string_view data, const std::string& name) {
  std::vector<std::pair<const char*, std::size_t>> places;
  for (const auto& [tensor_name, tensor] : tensors) places.emplace_back(static_cast<const char*>(tensor.data), tensor.bytes);
  std::sort(places.begin(), places.end());
  const char* reached = data.data();
  for (const auto& [first, bytes] : places) {
    if (first != reached) throw unreadable(name, "its tensors leave gaps or lie on one another");
    reached += bytes;
  }
  if (reached != data.data() + data.size()) throw unreadable(name, "it is longer or shorter than its tensors");
}

void write_all(int file, const void* data, std::size_t size) {
  const auto* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(file, bytes, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw std::system_error(errno, std::generic_category());
    bytes += written;
    size -= static_cast<std::size_t>(written);
  }
}

// A temporary file beside its place. It is removed unless it is renamed.
class Temporary {
 public:
  explicit Temporary(const std::filesystem::path& beside)
      : name_((beside.parent_path() / ("." + beside.filename().string() + ".partial-XXXXXX")).string()),
        file_(::mkstemp(name_.data())) {
    if (file_ < 0) throw std::system_error(errno, std::generic_category());
  }
  ~Temporary() {
    if (file_ >= 0) ::close(file_);
    if (!named_) ::unlink(name_.c_str());
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  int file() const { return file_; }
  void give_name(const std::filesystem::path& path) {
    if (::fsync(file_) != 0 || ::close(std::exchange(file_, -1)) != 0) throw std::system_error(errno, std::generic_category());
    std::filesystem::rename(name_, path);
    named_ = true;
  }

 private:
  std::string name_;
  int file_;
  bool named_ = false;
};

std::string header_of(const std::map<std::string, TensorView>& tensors, const About& about,
                      const std::vector<std::string>& order) {
  Json header;
  header[kMetadata] = about;
  std::size_t offset = 0;
  for (const std::string& name : order) {
    const TensorView& tensor = tensors.at(name);
    header[name] = {{"dtype", tensor.is_float ? "F32" : "I64"},
                    {"shape", tensor.shape},
                    {"data_offsets", {offset, offset + tensor.bytes}}};
    offset += tensor.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace

SafetensorsFile parse_layout(std::string_view content, const std::string& name) {
  std::uint64_t length = 0;
  if (content.size() < kLengthBytes) throw unreadable(name, "it is too short");
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    length |= std::uint64_t{static_cast<unsigned char>(content[i])} << (8 * i);
  }
  if (length > kMostHeader) {
    throw unreadable(name, "its header is declared as " + std::to_string(length) + " bytes; at most " + std::to_string(kMostHeader) +
                               " are read");
  }
  if (length > content.size() - kLengthBytes) throw unreadable(name, "its header is longer than the file");
  const std::string_view text = content.substr(kLengthBytes, length), data = content.substr(kLengthBytes + length);
  Json header;
  try {
    header = parse_json(text, kMostHeader);
  } catch (const JsonError& error) {
    throw unreadable(name, std::string("its header is not JSON: ") + error.what());
  }
  if (!header.is_object()) throw unreadable(name, "its header does not describe tensors");
  SafetensorsFile file;
  for (const auto& [key, entry] : header.items()) {
    if (key != kMetadata) {
      file.tensors[key] = parse_tensor(entry, data, name, key);
      continue;
    }
    if (!entry.is_object()) throw unreadable(name, "its header does not describe tensors");
    for (const auto& [about, value] : entry.items()) {
      if (!value.is_string()) throw unreadable(name, "its header does not describe tensors");
      file.about[about] = value.get<std::string>();
    }
  }
  check_cover(file.tensors, data, name);
  return file;
}

SafetensorsFile parse_tensors(std::string_view content, const std::string& name) {
  SafetensorsFile file = parse_layout(content, name);
  const auto expected = file.about.find(kChecksum);
  if (expected == file.about.end()) throw unreadable(name, std::string("its metadata has no ") + kChecksum + ": this package did not write it");
  const std::string declared = expected->second;
  file.about.erase(expected);
  const std::string got = checksum(file.tensors, file.about);
  if (declared != got) {
    throw unreadable(name, "expected sha256 " + declared.substr(0, 16) + "… of its content, got " + got.substr(0, 16) + "…");
  }
  return file;
}

std::string read_content(const std::filesystem::path& path) {
  try {
    return RegularFile(path).content(kMostFile);
  } catch (const FileError& error) {
    throw unreadable(path.string(), error.what());
  }
}

void write_tensors(const std::filesystem::path& given, const std::map<std::string, TensorView>& tensors, const About& about) {
  try {
    // A link is followed: its target is replaced.
    const std::filesystem::path path = std::filesystem::weakly_canonical(std::filesystem::absolute(given));
    if (std::filesystem::exists(path) && !std::filesystem::is_regular_file(path)) {
      throw failure(ErrorCode::encoding, path.string() + " exists and is not a file.", {}, "give the path of a file");
    }
    About whole = about;
    whole[kChecksum] = checksum(tensors, about);
    // The widest elements first, so that all of them are aligned.
    std::vector<std::string> order;
    for (const bool floats : {false, true}) {
      for (const auto& [name, tensor] : tensors) {
        if (tensor.is_float == floats) order.push_back(name);
      }
    }
    const std::string header = header_of(tensors, whole, order);
    std::array<char, kLengthBytes> length{};
    for (std::size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
    Temporary temporary(path);
    write_all(temporary.file(), length.data(), length.size());
    write_all(temporary.file(), header.data(), header.size());
    for (const std::string& name : order) write_all(temporary.file(), tensors.at(name).data, tensors.at(name).bytes);
    temporary.give_name(path);
  } catch (const std::system_error& error) {
    throw failure(ErrorCode::encoding, given.string() + " cannot be written.", {error.code().message()},
                  "give a path in a directory that exists, with room to write");
  }
}

}  // namespace llm2slm::detail
