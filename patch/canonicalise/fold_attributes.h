#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Replaces attributes that are plain numbers, booleans, strings or None by constants, so that branches on them
// (`if self.norm_first:`) fold away and head counts become visible. `training` stays an attribute, and so does whatever
// a method of the module assigns. Then folds constants and constant branches, and drops dead code.
void fold_attributes(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

// Folds constants, does peephole optimizations, and drops common subexpressions and dead code, until nothing changes.
void simplify(std::shared_ptr<torch::jit::Graph> graph);

}  // namespace torchgraft
