#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/sites/base_weight.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace torchgraft {

// Where the update of a LoRA goes: rows of a tensor of the base.
struct MergePlace {
  size_t module = 0;  // index into the adapter's plan
  LinearSite site;
  BaseWeight weight;
  int64_t out_features = 0;
};

// The places of an adapter that consists of LoRA, each once: a layer that runs again reads the same rows. Throws
// c10::Error when a weight is no parameter of `module`.
std::vector<MergePlace> merge_places(const Adapter& adapter, const GraphSites& sites, const torch::jit::Module& module);

// Throws c10::Error, naming the other use, unless every use of the places' weights is one that `adapter` changes in the
// same way. `graph` is the canonical graph of forward, which `sites` point into. The other methods of `module` may run
// forward, but read no such weight themselves. Weights that share memory are told apart: a merged weight becomes a
// tensor of its own.
void check_places_are_all(const std::vector<MergePlace>& places, const Adapter& adapter, const GraphSites& sites,
                          torch::jit::Graph& graph, const torch::jit::Module& module);

}  // namespace torchgraft
