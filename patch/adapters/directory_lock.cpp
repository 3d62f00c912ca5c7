#include <torchgraft/patch/adapters/directory_lock.h>

#include <c10/util/Exception.h>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <thread>

namespace torchgraft {
namespace {

constexpr std::chrono::seconds kLongestWait(60);
constexpr std::chrono::milliseconds kLockPause(10);

}  // namespace

DirectoryLock::DirectoryLock(const std::string& directory) {
  descriptor_ = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor_ < 0) {
    return;  // whoever writes there says why that is not possible
  }
  const auto deadline = std::chrono::steady_clock::now() + kLongestWait;
  while (!(is_held_ = flock(descriptor_, LOCK_EX | LOCK_NB) == 0) && (errno == EWOULDBLOCK || errno == EINTR)) {
    if (std::chrono::steady_clock::now() >= deadline) {
      close(descriptor_);
      TORCH_CHECK(false, directory, ": another process has been writing into this directory for ", kLongestWait.count(),
                  " seconds; wait for it, or end it");
    }
    std::this_thread::sleep_for(kLockPause);
  }
}

DirectoryLock::~DirectoryLock() {
  if (descriptor_ >= 0) {
    close(descriptor_);
  }
}

Look look_between_updates(const std::string& directory, const std::function<void()>& look) {
  const int descriptor = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) {
    return Look::kWithoutLocks;
  }
  Look result = Look::kDone;
  if (flock(descriptor, LOCK_SH | LOCK_NB) == 0) {
    look();
  } else {
    result = errno == EWOULDBLOCK || errno == EINTR ? Look::kLocked : Look::kWithoutLocks;
  }
  close(descriptor);
  return result;
}

}  // namespace torchgraft
