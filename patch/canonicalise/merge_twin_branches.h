#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// An `if` whose two branches run the same layers and differ only in what they are called with becomes those layers,
// once, called with what the condition selects:
//   if mask is not None or is_causal:                            m = mask if ... else None
//       for block in blocks: x = block(x, mask, is_causal)       c = is_causal if ... else False
//   else:                                                        for block in blocks: x = block(x, m, c)
//       for block in blocks: x = block(x)
// timm's vision transformers are written so. Only branches with linear maps are touched. Run after inline_calls and
// before constants are folded, which tells twins apart.
void merge_twin_branches(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
