#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Merges the two branches of an `if` that run the same layers with different arguments. The layers then run once, with
// the arguments that the condition selects:
//   if mask is not None or is_causal:                            m = mask if ... else None
//       for block in blocks: x = block(x, mask, is_causal)       c = is_causal if ... else False
//   else:                                                        for block in blocks: x = block(x, m, c)
//       for block in blocks: x = block(x)
// timm's vision transformers are written so. Changes branches with linear maps only. Run after inline_calls and before
// constants are folded: folding makes twins differ.
void merge_twin_branches(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
