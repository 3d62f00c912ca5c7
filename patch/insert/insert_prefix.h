#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Puts a gated_prefix_attention in the place of the attention of the inserter's layer; the attention itself is dead
// afterwards. Returns the gate.
torch::jit::Value* insert_prefix(Inserter& inserter, const Slot& slot);

}  // namespace torchgraft
