#pragma once

#include <functional>
#include <string>

namespace torchgraft {

// One process at a time changes the files of a directory: flock() on the directory itself, which leaves no file behind
// and ends with the process. Does nothing where the file system has no locks.
class DirectoryLock {
 public:
  // Waits for others, but throws c10::Error when one of them holds the lock for long.
  explicit DirectoryLock(const std::string& directory);
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;
  ~DirectoryLock();

  // False: another process may be changing the directory.
  bool is_held() const { return is_held_; }

 private:
  int descriptor_ = -1;
  bool is_held_ = false;
};

// Whether a process holds that lock. Otherwise calls `look` and keeps all from taking it meanwhile, but where the file
// system has no locks, or the directory cannot be opened: then nobody waits for anybody.
enum class Look { kDone, kLocked, kWithoutLocks };
Look look_between_updates(const std::string& directory, const std::function<void()>& look);

}  // namespace torchgraft
