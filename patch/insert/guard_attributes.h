#pragma once

#include <torchgraft/patch/graph/graph_utils.h>

#include <memory>
#include <vector>

namespace torchgraft {

// Lets `graph` begin with checks that the attributes `folded`, which it took for constants, have the values that they
// had: whoever sets `module.scale = 3.0` after grafting gets an error that names the attribute.
void guard_attributes(const std::shared_ptr<torch::jit::Graph>& graph, const std::vector<ModuleAttribute>& folded);

}  // namespace torchgraft
