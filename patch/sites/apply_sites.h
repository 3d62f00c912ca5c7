#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <optional>

namespace torchgraft {

// Overrules `detected` by `wanted`, an edited copy of its structure. What `wanted` leaves out is no site any more;
// kinds, numbers, norm orders and paths come from `wanted`. Sizes are facts of the graph and must agree.
//
// Throws c10::Error, naming the entry and what the model has instead, when an index is unknown or comes twice, when no
// linear map or several have a path, and when an entry asks for a residual add or norm that does not exist.
GraphSites apply_sites(const GraphSites& detected, const Structure& wanted, const CanonicalGraph& canonical,
                       const torch::jit::Module& module);

// Finds the sites of `canonical` and overrules them by `wanted`, if given.
GraphSites choose_sites(const CanonicalGraph& canonical, const torch::jit::Module& module,
                        const std::optional<Structure>& wanted);

}  // namespace torchgraft
