#pragma once

#include <torchgraft/plan/structure.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>

namespace torchgraft {

// Describes what the patcher finds in `module`, or in the base of a grafted one. A module without attention is no
// error: the result has no layers then, and its near misses say why. `sites`, an edited description, overrules what is
// found.
TORCHGRAFT_PATCH_API Structure inspect(const torch::jit::Module& module,
                                       const std::optional<Structure>& sites = std::nullopt);

}  // namespace torchgraft
