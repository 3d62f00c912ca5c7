#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <string>

namespace torchgraft {

// Describes `attention`, an aten::scaled_dot_product_attention, in `layer` and `sites`: its sizes, kind and mask, and
// the projections behind its queries, keys and values. Returns false, with the reason in words, when no adapter can
// work on it. A projection that LoRA alone cannot work on is left out, with a note.
bool find_attention(SiteFinder& finder, torch::jit::Node* attention, Layer& layer, LayerSites& sites,
                    std::string& reason);

}  // namespace torchgraft
