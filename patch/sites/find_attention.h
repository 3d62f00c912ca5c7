#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <string>

namespace torchgraft {

// Fills what `layer` and `sites` say of `attention`, an aten::scaled_dot_product_attention: its sizes, its kind, its
// mask, and the projections behind its queries, keys and values. False, with the reason in words, when no adapter can
// work on it at all; a projection that only LoRA cannot work on is left out with a note.
bool find_attention(SiteFinder& finder, torch::jit::Node* attention, Layer& layer, LayerSites& sites,
                    std::string& reason);

}  // namespace torchgraft
