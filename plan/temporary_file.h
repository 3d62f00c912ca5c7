#pragma once

#include <torchgraft/registration/export.h>

#include <sys/types.h>

#include <cstddef>
#include <optional>
#include <string>

namespace torchgraft {

// The end of the name of every file that torchgraft makes for a while. What has this end, and no living process has
// locked, may be deleted.
inline constexpr const char* kTemporaryEnd = ".torchgraft-tmp";

// A file beside `target`, .TARGET.XXXXXX.torchgraft-tmp, that becomes it in keep(). Deletes the file if keep() was not
// called. A process that is killed leaves its file: the next TemporaryFile for the same target deletes it. A file that
// a living process writes stays: it is locked (flock), and the lock ends with its process.
class TORCHGRAFT_PATCH_API TemporaryFile {
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
  std::optional<mode_t> old_mode_;  // of the file that will be replaced
  int descriptor_ = -1;
};

// Deletes a regular file of this user, unless a living process has it locked.
void delete_if_dead(const std::string& path);

// Deletes the files that killed writers of `target` left beside it.
TORCHGRAFT_PATCH_API void remove_leftovers(const std::string& target);

}  // namespace torchgraft
