#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <map>

namespace torchgraft {

// Enters the arguments of the graph that may be masks [B * heads, S, S] of one attention, or parts of such a mask, and
// its heads.
void add_heads_of_masks(const torch::jit::Node* attention, std::map<const torch::jit::Value*, int64_t>& found);

}  // namespace torchgraft
