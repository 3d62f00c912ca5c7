#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <optional>

namespace torchgraft {

// `detected` overruled by `wanted`, an edited copy of its structure: entries that are missing lose their places, kinds,
// numbers, norm orders and paths are taken from `wanted`. Sizes are facts of the graph and must agree.
//
// Throws c10::Error, naming the entry and what the model has instead, when an entry's index is unknown or given twice,
// a path is that of no (or of several) linear maps, or a residual add or norm that it asks for does not exist.
GraphSites apply_sites(const GraphSites& detected, const Structure& wanted, const CanonicalGraph& canonical,
                       const torch::jit::Module& module);

// The sites found in `canonical`, overruled by `wanted` where that is given.
GraphSites choose_sites(const CanonicalGraph& canonical, const torch::jit::Module& module,
                        const std::optional<Structure>& wanted);

}  // namespace torchgraft
