#pragma once

#include <torchgraft/registration/export.h>

#include <functional>
#include <string>
#include <vector>

namespace torchgraft {

// Calls `read`, which reads some of `files` in `directory`, and calls it again as long as another process replaces them
// meanwhile: what the last call read is of one version, not old weights with a new head. Whatever the earlier calls
// threw is forgotten. While the file `marker` is missing, which says that another process is renaming, waits for it,
// but not for long. Throws what the last call threw, and c10::Error when the files change all the time.
TORCHGRAFT_PATCH_API void read_one_version(const std::string& directory, const std::vector<std::string>& files,
                                           const std::string& marker, const std::function<void()>& read);

}  // namespace torchgraft
