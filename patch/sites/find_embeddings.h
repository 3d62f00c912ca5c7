#pragma once

#include <torchgraft/patch/sites/find_sites.h>
#include <torchgraft/patch/sites/site_finder.h>

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Finds where invertible adapters act, once the layers are known and marked. The rule: the value that the residual
// stream of the first layer begins with, of the encoder where there is an encoder and a decoder; where a linear map
// makes it of embeddings (ELECTRA, ALBERT), what this map reads; in each case behind dropout. The output embeddings are
// the one linear map of tokens from so many features to as many outputs as the table of the tokens has rows.
// Sets `embeddings` and the structure's fields of them.
void find_embeddings(SiteFinder& finder, const std::shared_ptr<torch::jit::Graph>& graph, GraphSites& sites);

}  // namespace torchgraft
