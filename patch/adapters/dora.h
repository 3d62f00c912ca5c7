#pragma once

#include <torchgraft/patch/module/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

namespace torchgraft {

// Gives the DoRA modules of `adapter` what the base's weights W say: weight_norm, the norms of the rows of W + B A, and
// for a new adapter the magnitudes, those of W. What is there already stays.
void complete_dora(Adapter& adapter, const GraphSites& sites, const torch::jit::Module& module);

}  // namespace torchgraft
