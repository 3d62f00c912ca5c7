#pragma once

#include <torchgraft/patch/graph/graph_utils.h>

#include <memory>
#include <vector>

namespace torchgraft {

// Adds checks at the top of `graph`: each attribute in `folded`, which the graph holds as a constant, must still have
// that value. Whoever sets `module.scale = 3.0` after grafting gets an error that names the attribute.
void guard_attributes(const std::shared_ptr<torch::jit::Graph>& graph, const std::vector<ModuleAttribute>& folded);

}  // namespace torchgraft
