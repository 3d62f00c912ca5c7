#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

namespace torchgraft {

// Throws c10::Error unless `adapter` is frozen and consists of ungated LoRA alone. The message says which part no
// weight can hold, and why.
void check_can_merge(const Adapter& adapter);

// merge: adds the adapter's updates to the weights of `module` that its projections read, and sets its scaling to 0.
// Else subtracts the updates and restores the scaling. The changed weights become tensors of their own. Changes nothing
// when it throws.
void move_into_base(Adapter& adapter, const GraphSites& sites, const torch::jit::Module& module, bool merge);

}  // namespace torchgraft
