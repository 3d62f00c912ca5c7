#pragma once

#include <torchgraft/registration/export.h>

#include <functional>
#include <string>
#include <vector>

namespace torchgraft {

// Calls `read`, which reads some of `files` in `directory`, and calls it again as long as another process replaces them
// meanwhile: what the last call read is of one version, not old weights with a new head. Whatever the earlier calls
// threw is forgotten. Waits as has_marker() does. Throws what the last call threw, and c10::Error when the files change
// all the time.
TORCHGRAFT_PATCH_API void read_one_version(const std::string& directory, const std::vector<std::string>& files,
                                           const std::string& marker, const std::function<void()>& read);

// Whether the file `marker` is in the directory. Where it is missing and another process is changing the directory,
// waits for that to end, but not for long.
bool has_marker(const std::string& directory, const std::string& marker);

}  // namespace torchgraft
