#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Puts straight-line code (projections, scaled_dot_product_attention, one linear) in the place of a call of a scripted
// torch.nn.MultiheadAttention.forward, whose own body is some 800 nodes of branches: self and cross attention, one
// packed weight or three of other widths (kdim, vdim), either layout, any mask. Returns false, and changes nothing, for
// any other call and for what the straight line does not cover: keys and values that torch.nn adds (add_bias_kv,
// add_zero_attn) and attention weights that somebody reads.
//
// Same results as the module on inputs of rank 3; an unbatched input (rank 2) raises an exception.
bool decompose_multihead_attention(torch::jit::Node* call, const torch::jit::Module& root);

}  // namespace torchgraft
