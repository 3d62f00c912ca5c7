#pragma once

#include <torchgraft/patch/sites/find_sites.h>
#include <torchgraft/patch/sites/site_finder.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Adds embeddings of tokens, on which a LoRA can be, to the linear maps of the first layer: those whose table nothing
// else reads or writes. A table that is tied to a linear map is none, nor is one of max_norm.
void find_lookups(SiteFinder& finder, const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module,
                  GraphSites& found);

}  // namespace torchgraft
