#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/sites/find_sites.h>

namespace torchgraft {

// Checks a trained adapter: a library puts its LoRA into a linear map, and changes each place that applies it; a LoRA
// here acts in one layer. Throws c10::Error, on behalf of `what`, that names a linear map that runs elsewhere, too.
void check_applied_once(const Adapter& adapter, const GraphSites& sites, const char* what);

}  // namespace torchgraft
