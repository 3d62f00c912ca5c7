#pragma once

#include <torchgraft/patch/sites/find_sites.h>
#include <torchgraft/patch/sites/site_finder.h>

namespace torchgraft {

// Moves attentions that are heads of one attention, computed one by one, from the layers of `sites` to `left_out`:
// several that project the same inputs, and whose results are concatenated, written side by side or added before any
// linear map. As layers they would have a prefix and a LoRA for each head, and a number for each: other places than the
// adapters library has for the same model.
void leave_out_single_heads(GraphSites& sites, SiteFinder& finder);

}  // namespace torchgraft
