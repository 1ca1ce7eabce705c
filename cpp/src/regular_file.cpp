#include "regular_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <vector>

#include "sha256.hpp"

namespace llm2slm::detail {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;

FileError failed() { return FileError(std::generic_category().message(errno)); }

void require_regular(const struct stat& status) {
  if (S_ISDIR(status.st_mode)) throw FileError("is a directory");
  if (!S_ISREG(status.st_mode)) throw FileError("is not a regular file");
}

}  // namespace

RegularFile::RegularFile(const std::filesystem::path& path) {
  struct stat status {};
  // Checked before opening, because opening a device may have an effect.
  if (::stat(path.c_str(), &status) != 0) throw failed();
  require_regular(status);
  // The file may have been replaced by a pipe meanwhile: opening must not wait for its other end.
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file_ < 0) throw failed();
  try {
    if (::fstat(file_, &status) != 0) throw failed();
    require_regular(status);
  } catch (const FileError&) {
    ::close(file_);
    throw;
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

RegularFile::~RegularFile() { ::close(file_); }

std::size_t RegularFile::read(std::uint64_t offset, void* to, std::size_t count) const {
  std::size_t done = 0;
  while (done < count) {
    const ssize_t got = ::pread(file_, static_cast<char*>(to) + done, count - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw failed();
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::string RegularFile::content(std::uint64_t most) const {
  if (size_ > most) throw FileError(std::to_string(size_) + " bytes, at most " + std::to_string(most) + " are read");
  std::string text(static_cast<std::size_t>(size_), '\0');
  text.resize(read(0, text.data(), text.size()));
  return text;
}

std::string RegularFile::sha256() const {
  Sha256 digest;
  std::vector<char> piece(kPiece);
  std::uint64_t offset = 0;
  while (const std::size_t got = read(offset, piece.data(), piece.size())) {
    digest.update(piece.data(), got);
    offset += got;
  }
  return digest.hex();
}

}  // namespace llm2slm::detail
