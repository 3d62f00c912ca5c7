#pragma once

#include <torchgraft/patch/adapter_pool.h>

#include <string>
#include <vector>

namespace torchgraft {

// Which of options.room a pool on `module` could not make rows for, and why: one text for each, empty for those that
// have room beside all before them. The pool itself throws for the first of the others. Throws c10::Error when the
// module is no Transformer, as the pool does.
TORCHGRAFT_PATCH_API std::vector<std::string> check_room(const torch::jit::Module& module,
                                                         const AdapterPoolOptions& options);

}  // namespace torchgraft
