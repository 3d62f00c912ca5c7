#pragma once

#include <torchgraft/patch/module/merge_places.h>

#include <vector>

namespace torchgraft {

// Throws c10::Error unless `adapter` is frozen and consists of ungated LoRA alone. The message says which part no
// weight can hold, and why.
void check_can_merge(const Adapter& adapter);

// merge: adds the adapter's updates to its `places` in the base, and sets its scaling to 0. Else subtracts the updates
// and restores the scaling. The changed weights become tensors of their own.
void move_into_base(Adapter& adapter, const std::vector<MergePlace>& places, bool merge);

}  // namespace torchgraft
