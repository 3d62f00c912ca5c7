#pragma once

#include <torchgraft/registration/export.h>

#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// Several files of a directory that belong together, changed as one. All are written under other names first, where a
// full disk shows; commit() only renames. While it does, the file that makes the directory an adapter is not there: a
// reader, or a process that was killed in between, leaves no mixture of old and new that loads.
class TORCHGRAFT_PATCH_API DirectoryUpdate {
 public:
  // Makes the directory if need be. Throws c10::Error when that fails.
  explicit DirectoryUpdate(std::string directory);
  DirectoryUpdate(const DirectoryUpdate&) = delete;
  DirectoryUpdate& operator=(const DirectoryUpdate&) = delete;
  // Removes what was staged and not committed.
  ~DirectoryUpdate();

  // The path where the new content of the file `name` is to be written.
  std::string stage(const std::string& name);
  // The same, written here.
  void stage(const std::string& name, std::string_view content);

  // Puts the staged files in place and takes `obsolete` ones away; `marker`, one of the staged, comes last. Throws
  // c10::Error when a file cannot be moved.
  void commit(const std::string& marker, const std::vector<std::string>& obsolete);

 private:
  std::string path_of(const std::string& name) const { return directory_ + "/" + name; }
  std::string staged_path(const std::string& name) const;

  std::string directory_;
  std::vector<std::string> staged_;  // names
};

}  // namespace torchgraft
