// A regular file, opened once, so that the checked content is the content that is read.
#ifndef LLM2SLM_REGULAR_FILE_HPP
#define LLM2SLM_REGULAR_FILE_HPP

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace llm2slm::detail {

/// Why a file cannot be read: a word or two, without its name.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class RegularFile {
 public:
  /// Open it. Throws FileError: there is none, or it is not a regular file; a pipe or a device is not opened.
  explicit RegularFile(const std::filesystem::path& path);
  ~RegularFile();
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  std::uint64_t size() const { return size_; }
  /// Read up to `count` bytes at an offset; fewer only at the end. Throws FileError.
  std::size_t read(std::uint64_t offset, void* to, std::size_t count) const;
  /// All of it. Throws FileError: it has more than `most` bytes, or cannot be read.
  std::string content(std::uint64_t most) const;
  /// Of what it holds now, however long. Throws FileError.
  std::string sha256() const;

 private:
  int file_ = -1;
  std::uint64_t size_ = 0;
};

}  // namespace llm2slm::detail

#endif
