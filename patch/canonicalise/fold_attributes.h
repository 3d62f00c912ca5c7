#pragma once

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <vector>

namespace torchgraft {

// Replaces attributes that are plain numbers, booleans, strings or None by constants, so that branches on them
// (`if self.norm_first:`) fold away and head counts become visible. `training` stays an attribute, and so does whatever
// a method of the module assigns. Then folds constants and constant branches, and drops dead code. Returns what was
// folded, each attribute once: the graph holds as long as these keep their values (insert/guard_attributes.h).
std::vector<ModuleAttribute> fold_attributes(const std::shared_ptr<torch::jit::Graph>& graph,
                                             const torch::jit::Module& module);

// Replaces `training` by false where the module is in eval mode and the attribute decides whether an attention runs
// (LayerDrop: `if not self.training or keep(): x = layer(x)`). Returns what was folded.
std::vector<ModuleAttribute> fold_training(const std::shared_ptr<torch::jit::Graph>& graph,
                                           const torch::jit::Module& module);

// Folds constants, does peephole optimizations, and drops common subexpressions and dead code, until nothing changes.
void simplify(std::shared_ptr<torch::jit::Graph> graph);

}  // namespace torchgraft
