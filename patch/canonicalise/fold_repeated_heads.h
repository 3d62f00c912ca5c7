#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Grouped-query attention that repeats its key and value heads before a scaled_dot_product_attention
// (unsqueeze, expand, reshape as in transformers' repeat_kv; or repeat_interleave) gets the heads as they are and
// enable_gqa=True: prefixes have as many heads as keys and values have of their own.
void fold_repeated_heads(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
