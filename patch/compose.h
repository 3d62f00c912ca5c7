#pragma once

#include <torchgraft/config/composition_string.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torchgraft {

// Returns a copy of the grafted `module` with the composition `tree` of adapters that it has. The composition has a
// name and an id as an adapter has: activate(name), adapter_ids, list_adapters, remove_adapters, rename_adapter. Ids of
// compositions follow those of adapters. One batch may mix its rows with those of adapters, of other compositions and
// of the base. Its gates are under "<name>.<adapter>" in forward_with_gates.
//
// Results are those of the adapters library with set_active_adapters(tree), for each row as for that row alone. Where
// it refuses, this throws c10::Error with the adapter and the site: an adapter is unknown, blocks cannot be nested so,
// a method has no such block, an adapter that a block reads from does nothing in a layer.
TORCHGRAFT_PATCH_API torch::jit::Module compose(const torch::jit::Module& module, const std::string& name,
                                                const Composition& tree, const VerifyOptions& verifying = {});

// The ids that rows of each task of the composition `name` have in adapter_ids, in the order of the tasks: of a
// MultiTask(a, b) those of a and of b. compose() adds a composition for each task that is more than one adapter,
// "<name>_<task>", where the module has none of its tree. Throws c10::Error when `name` has no MultiTask.
TORCHGRAFT_PATCH_API std::vector<int64_t> task_ids(const torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
