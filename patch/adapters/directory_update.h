#pragma once

#include <torchgraft/patch/adapters/directory_lock.h>
#include <torchgraft/registration/export.h>

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// Changes several files of a directory as one. All are written under other names first, so that a full disk does no
// harm; commit() only renames. While it renames, the file that makes the directory an adapter is missing: no reader
// loads a mixture of old and new, not even when the process is killed meanwhile. Two processes that save into one
// directory take turns. What a killed one left, the next one removes; its new marker, which says whose the files are,
// it removes last.
class TORCHGRAFT_PATCH_API DirectoryUpdate {
 public:
  // Makes the directory if need be. `marker` is the file that makes it an adapter. `check` may throw, and looks at the
  // directory while no other process changes it, before anything is removed. Throws c10::Error when the directory
  // cannot be made, or when another process writes for a minute.
  DirectoryUpdate(std::string directory, std::string marker, const std::function<void()>& check = nullptr);
  DirectoryUpdate(const DirectoryUpdate&) = delete;
  DirectoryUpdate& operator=(const DirectoryUpdate&) = delete;
  // Removes what was staged and not committed, and directories that were made for it.
  ~DirectoryUpdate();

  // Returns the path for the new content of the file `name`. The caller writes it.
  std::string stage(const std::string& name);
  // Lets `write` write the new content of the file `name` to a path. Its errors name the file, not that path.
  void stage(const std::string& name, const std::function<void(const std::string& path)>& write);
  // Writes the new content of the file `name`.
  void stage(const std::string& name, std::string_view content);

  // Puts the staged files in place and removes the `obsolete` ones. The marker, one of the staged, comes last. Throws
  // c10::Error when a file cannot be moved.
  void commit(const std::vector<std::string>& obsolete);

  // The paths of markers that killed processes had not put in place yet. The other files of `directory` may be theirs.
  static std::vector<std::string> staged_markers(const std::string& directory, const std::string& marker);

 private:
  std::string path_of(const std::string& name) const { return directory_ + "/" + name; }
  std::string staged_path(const std::string& name) const;

  void remove_leftovers() const;
  void remove_made();

  std::string directory_;
  std::string marker_;
  std::optional<DirectoryLock> lock_;
  std::vector<std::string> staged_;          // names
  std::vector<std::filesystem::path> made_;  // directories that there were not, innermost first; empty once committed
};

// Whether there is anything at `path`, which may be a link to nothing.
bool is_file_there(const std::string& path);

}  // namespace torchgraft
