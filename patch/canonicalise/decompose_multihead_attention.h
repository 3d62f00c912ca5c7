#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Replaces a call of a scripted torch.nn.MultiheadAttention.forward, whose body is some 800 nodes of branches, by
// straight-line code: projections, scaled_dot_product_attention, one linear. Covers self and cross attention, one
// packed weight or three of other widths (kdim, vdim), either layout, and any mask. Returns false, and changes nothing,
// for any other call, for keys and values that torch.nn adds (add_bias_kv, add_zero_attn), and for attention weights
// that are read.
//
// Results are the module's own on inputs of rank 3. An unbatched input (rank 2) raises an exception.
bool decompose_multihead_attention(torch::jit::Node* call, const torch::jit::Module& root);

}  // namespace torchgraft
