#include <torchgraft/plan/regular_file.h>

#include <c10/util/Exception.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace torchgraft {
namespace {

const char* kind_of_file(mode_t mode) {
  return S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a FIFO" : S_ISSOCK(mode) ? "a socket" : "a device";
}

void check_kind(const std::string& path, const struct stat& status) {
  TORCH_CHECK(S_ISREG(status.st_mode), path, ": expected a regular file, got ", kind_of_file(status.st_mode));
}

}  // namespace

RegularFile::RegularFile(const std::string& path, uint64_t most_bytes) : path_(path) {
  struct stat status{};
  const auto check_call = [&](bool done) { TORCH_CHECK(done, path, ": cannot read (", std::strerror(errno), ")"); };
  check_call(stat(path.c_str(), &status) == 0);
  check_kind(path, status);  // opening a device may have effects
  descriptor_ = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  check_call(descriptor_ >= 0);
  try {
    check_call(fstat(descriptor_, &status) == 0);
    check_kind(path, status);  // another file may have come in between
    size_ = static_cast<uint64_t>(status.st_size);
    TORCH_CHECK(size_ <= most_bytes, path, ": expected a file of at most ", most_bytes, " bytes, got ", size_);
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

RegularFile::~RegularFile() { close(descriptor_); }

void RegularFile::read(void* data, size_t bytes, const std::string& what) {
  char* target = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t count = ::read(descriptor_, target, bytes);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    TORCH_CHECK(count >= 0, path_, ": cannot read ", what, " (", std::strerror(errno), ")");
    TORCH_CHECK(count > 0, path_, ": cannot read ", what, ", the file has become shorter");
    target += count;
    bytes -= static_cast<size_t>(count);
  }
}

std::string read_text(const std::string& path, uint64_t most_bytes) {
  RegularFile file(path, most_bytes);
  std::string text(file.size(), '\0');
  file.read(text.data(), text.size(), "its text");
  return text;
}

}  // namespace torchgraft
