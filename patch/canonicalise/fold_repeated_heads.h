#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Removes the repetition of key and value heads before a scaled_dot_product_attention (unsqueeze, expand, reshape as in
// transformers' repeat_kv; or repeat_interleave), and sets enable_gqa=True instead. Prefixes have as many heads as keys
// and values have without the repetition.
void fold_repeated_heads(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
