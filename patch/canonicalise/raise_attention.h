#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <string>
#include <vector>

namespace torchgraft {

// A softmax that looked like attention but was not rewritten, and why.
struct UnraisedSoftmax {
  torch::jit::Node* softmax = nullptr;  // or what stands in its place
  std::string reason;
  bool is_attention = false;  // for all that is known (may_be_attention.h)
};

// Rewrites attention that is written out, matmul -> scale -> mask -> softmax -> dropout -> matmul, as one
// aten::scaled_dot_product_attention.
//
// Between the first matmul and the softmax, scores may be multiplied or divided by numbers or learned temperatures (one
// for all, or one for each head), and added to, subtracted from, masked_fill'ed or where'd, in any order, also inside
// `if mask is not None:`. That path is affine in the scores, slope * scores + bias. Its constant factors become
// `scale`, those known only at run time multiply the queries, and the bias, which is what the path makes of zero
// scores, becomes `attn_mask`. So masks, relative position biases and their branches are carried over without being
// understood.
//
// The pass leaves alone, and gives the reason for: attention whose queries, keys, scores or masks are written in place
// (graph/writes.h), and masked_fill and where that write what is no mask (affine_path.h).
std::vector<UnraisedSoftmax> raise_attention(const std::shared_ptr<torch::jit::Graph>& graph,
                                             const torch::jit::Module& module);

}  // namespace torchgraft
