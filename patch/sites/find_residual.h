#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <optional>
#include <vector>

namespace torchgraft {

// The add that `branch` flows into, through dropout, norms, scales and rearrangements. The other operand is the
// residual stream when it is what the block has read (`block_input`); where two blocks add to one stream (parallel
// attention and feed-forward) the stream is a part of that operand, or comes in at a later add.
std::optional<ResidualSite> find_residual(SiteFinder& finder, torch::jit::Value* branch,
                                          torch::jit::Value* block_input);

// The output projection behind the layer's attention, and the residual add and norm behind that; notes what is missing.
void find_attention_residual(SiteFinder& finder, Layer& layer, LayerSites& sites);

// The values that a block reading `input` may take for the residual stream: `input` itself, and what it is the norm of.
std::vector<torch::jit::Value*> streams_of(torch::jit::Value* input);

// The norm order of a block that reads `input` and adds to `residual`; kPost still needs a norm after the add.
NormOrder norm_order(torch::jit::Value* input, torch::jit::Value* residual);

// The norm that alone reads `sum`, as after a post-norm block; null when there is none or others read it too.
torch::jit::Node* norm_after(torch::jit::Value* sum);

}  // namespace torchgraft
