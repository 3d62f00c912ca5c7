#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Replaces the attention of the inserter's layer by a gated_prefix_attention; the node of the attention is dead
// afterwards. Returns the op: (the attention's result, the gate).
torch::jit::Node* insert_prefix(Inserter& inserter, const Slot& slot);

}  // namespace torchgraft
