#include <torchgraft/plan/temporary_file.h>

#include <c10/util/Exception.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>

namespace torchgraft {
namespace {

constexpr std::string_view kTemporaryEnd = ".tmp";
constexpr size_t kRandomLetters = 6;

const char* write_fault() { return std::strerror(errno); }

// Whether TemporaryFile may have given a file this name.
bool is_temporary_of(std::string_view name, const std::string& target) {
  if (!name.starts_with(target + ".") || !name.ends_with(kTemporaryEnd) ||
      name.size() != target.size() + 1 + kRandomLetters + kTemporaryEnd.size()) {
    return false;
  }
  const std::string_view letters = name.substr(target.size() + 1, kRandomLetters);
  return std::all_of(letters.begin(), letters.end(), [](unsigned char c) { return std::isalnum(c); });
}

// Deletes the file if it is as mkstemps() makes it, and no process has it locked.
void delete_if_dead(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
  if (descriptor < 0) {
    return;
  }
  struct stat status{};
  const bool is_ours = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) &&
                       (status.st_mode & 0777) == (S_IRUSR | S_IWUSR) && status.st_uid == geteuid();
  if (is_ours && flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
    unlink(path.c_str());
  }
  close(descriptor);
}

void delete_dead_temporaries(const std::string& target) {
  const std::filesystem::path path(target);
  const std::string name = path.filename().string();
  std::error_code ignored;
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  for (std::filesystem::directory_iterator entry(folder, ignored), end; !ignored && entry != end;
       entry.increment(ignored)) {
    if (is_temporary_of(entry->path().filename().string(), name)) {
      delete_if_dead(entry->path().string());
    }
  }
}

}  // namespace

TemporaryFile::TemporaryFile(const std::string& target) : target_(target) {
  delete_dead_temporaries(target);
  open_locked();
}

// Another process may delete the file before it is locked: then makes another.
void TemporaryFile::open_locked() {
  for (;;) {
    name_ = target_ + "." + std::string(kRandomLetters, 'X') + std::string(kTemporaryEnd);
    descriptor_ = mkostemps(name_.data(), static_cast<int>(kTemporaryEnd.size()), O_CLOEXEC);
    TORCH_CHECK(descriptor_ >= 0, target_, ": cannot write (", write_fault(), ")");
    struct stat status{};
    flock(descriptor_, LOCK_EX);  // where the file system has no locks, nobody deletes either
    if (fstat(descriptor_, &status) != 0 || status.st_nlink > 0) {
      return;
    }
    close(descriptor_);
  }
}

TemporaryFile::~TemporaryFile() {
  if (descriptor_ >= 0) {
    unlink(name_.c_str());
    close(descriptor_);
  }
}

void TemporaryFile::write(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, bytes, size);
    TORCH_CHECK(written > 0 || errno == EINTR, target_, ": cannot write (", write_fault(), ")");
    bytes += std::max<ssize_t>(written, 0);
    size -= static_cast<size_t>(std::max<ssize_t>(written, 0));
  }
}

void TemporaryFile::keep() {
  struct stat old{};
  const mode_t mask = umask(0);
  umask(mask);
  const mode_t mode = stat(target_.c_str(), &old) == 0 ? old.st_mode & 0777 : 0666 & ~mask;
  const bool kept =
      fchmod(descriptor_, mode) == 0 && fsync(descriptor_) == 0 && rename(name_.c_str(), target_.c_str()) == 0;
  TORCH_CHECK(kept, target_, ": cannot write (", write_fault(), ")");
  close(descriptor_);
  descriptor_ = -1;
}

}  // namespace torchgraft
