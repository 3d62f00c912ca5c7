#pragma once

#include <cstddef>
#include <string>

namespace torchgraft {

// A file beside `target`, TARGET.XXXXXX.tmp, that becomes it in keep(). Deletes the file if keep() was not called. A
// process that is killed leaves its file: the next TemporaryFile for the same target deletes it. A file that a living
// process writes stays: it is locked (flock), and the lock ends with its process.
class TemporaryFile {
 public:
  // Throws c10::Error when the file cannot be made.
  explicit TemporaryFile(const std::string& target);
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile();

  void write(const void* data, size_t size);

  // Syncs the file and renames it to the target, readable for everyone whom the umask permits, or as an old one was.
  void keep();

 private:
  void open_locked();

  std::string target_;
  std::string name_;
  int descriptor_ = -1;
};

}  // namespace torchgraft
