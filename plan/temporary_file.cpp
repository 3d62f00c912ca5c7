#include <torchgraft/plan/temporary_file.h>

#include <c10/util/Exception.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <random>
#include <string_view>

namespace torchgraft {
namespace {

constexpr size_t kRandomLetters = 6;
constexpr mode_t kPermissions = 0777;

const char* write_fault() { return std::strerror(errno); }

// What the names of all TemporaryFiles for `target` begin with, without the folder.
std::string begin_of_names(const std::string& target) {
  return "." + std::filesystem::path(target).filename().string() + ".";
}

std::filesystem::path folder_of(const std::string& target) {
  const std::filesystem::path path(target);
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

std::string random_letters() {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
  std::random_device source;
  std::uniform_int_distribution<size_t> place(0, kLetters.size() - 1);
  std::string letters(kRandomLetters, ' ');
  std::generate(letters.begin(), letters.end(), [&] { return kLetters[place(source)]; });
  return letters;
}

// Whether TemporaryFile may have given a file this name.
bool is_temporary(std::string_view name, const std::string& begin) {
  const std::string_view end = kTemporaryEnd;
  if (name.size() != begin.size() + kRandomLetters + end.size() || !name.starts_with(begin) || !name.ends_with(end)) {
    return false;
  }
  const std::string_view letters = name.substr(begin.size(), kRandomLetters);
  return std::all_of(letters.begin(), letters.end(), [](unsigned char c) { return std::isalnum(c); });
}

}  // namespace

void delete_if_dead(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
  if (descriptor < 0) {
    return;
  }
  struct stat status{};
  const bool is_ours = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid();
  if (is_ours && flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
    unlink(path.c_str());
  }
  close(descriptor);
}

void remove_leftovers(const std::string& target) {
  const std::string begin = begin_of_names(target);
  std::error_code ignored;
  for (std::filesystem::directory_iterator entry(folder_of(target), ignored), end; !ignored && entry != end;
       entry.increment(ignored)) {
    if (is_temporary(entry->path().filename().string(), begin)) {
      delete_if_dead(entry->path().string());
    }
  }
}

TemporaryFile::TemporaryFile(const std::string& target) : target_(target) {
  struct stat old{};
  if (stat(target.c_str(), &old) == 0) {
    old_mode_ = old.st_mode & kPermissions;
  }
  remove_leftovers(target);
  open_locked();
}

// The system takes the umask's permissions away. umask() itself would change it for other threads, if only to read it.
// Another process may delete the file before it is locked: then makes another.
void TemporaryFile::open_locked() {
  constexpr mode_t kOwner = S_IRUSR | S_IWUSR;
  constexpr mode_t kEveryone = kOwner | S_IRGRP | S_IWGRP | S_IROTH | S_IWOTH;
  for (;;) {
    name_ = (folder_of(target_) / (begin_of_names(target_) + random_letters() + kTemporaryEnd)).string();
    descriptor_ = open(name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, old_mode_ ? kOwner : kEveryone);
    if (descriptor_ < 0 && errno == EEXIST) {
      continue;
    }
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
  TORCH_INTERNAL_ASSERT(descriptor_ >= 0, "written after keep()");
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, bytes, size);
    TORCH_CHECK(written > 0 || (written < 0 && errno == EINTR), target_, ": cannot write (", write_fault(), ")");
    bytes += std::max<ssize_t>(written, 0);
    size -= static_cast<size_t>(std::max<ssize_t>(written, 0));
  }
}

void TemporaryFile::keep() {
  TORCH_INTERNAL_ASSERT(descriptor_ >= 0, "kept twice");
  const bool kept = fsync(descriptor_) == 0 && (!old_mode_ || fchmod(descriptor_, *old_mode_) == 0) &&
                    rename(name_.c_str(), target_.c_str()) == 0;
  TORCH_CHECK(kept, target_, ": cannot write (", write_fault(), ")");
  close(descriptor_);
  descriptor_ = -1;
}

}  // namespace torchgraft
