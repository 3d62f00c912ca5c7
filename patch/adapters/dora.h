#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

namespace torchgraft {

// Gives the DoRA modules of `adapter` the parameters that follow from the base's weights W: weight_norm, the norms of
// the rows of W + B A, and for a new adapter the magnitudes, the norms of the rows of W. Parameters that it has already
// stay.
void complete_dora(Adapter& adapter, const GraphSites& sites, const torch::jit::Module& module);

}  // namespace torchgraft
