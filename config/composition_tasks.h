#pragma once

#include <torchgraft/config/composition.h>

#include <vector>

// A MultiTask in which each row uses the child of its task.
namespace torchgraft {

TORCHGRAFT_PATCH_API bool has_multi_task(const Composition& composition);

// What rows of each task use: the composition with each MultiTask replaced by its child of that task, a leaf where one
// adapter is left. Empty without a MultiTask.
TORCHGRAFT_PATCH_API std::vector<Composition> tasks_of(const Composition& composition);

// The adapters that stand within a MultiTask, each once.
TORCHGRAFT_PATCH_API std::vector<std::string> adapters_in_tasks(const Composition& composition);

// Throws c10::Error, in the name of `what`, for a MultiTask beside or around a block that no LoRA or no task can have,
// and for several with different numbers of children.
TORCHGRAFT_PATCH_API void check_tasks(const Composition& composition, const std::string& what);

}  // namespace torchgraft
