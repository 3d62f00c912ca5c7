#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <optional>
#include <vector>

namespace torchgraft {

// The residual add that `branch` flows into, through dropout, norms, scales and rearrangements. Its other operand is
// the residual stream, which the block reads as `block_input`. When two blocks add to one stream (parallel attention
// and feed-forward), the stream is a part of that operand, or comes in at a later add.
std::optional<ResidualSite> find_residual(SiteFinder& finder, torch::jit::Value* branch,
                                          torch::jit::Value* block_input);

// Finds the output projection behind the layer's attention, and the residual add and norm behind that. Notes what is
// missing.
void find_attention_residual(SiteFinder& finder, Layer& layer, LayerSites& sites);

// The same where the output projection is known.
void find_output_residual(SiteFinder& finder, Layer& layer, LayerSites& sites);

// The values that may be the residual stream of a block that reads `input`: `input` itself and, if it is a norm, what
// the norm reads.
std::vector<torch::jit::Value*> streams_of(torch::jit::Value* input);

// The norm order of a block that reads `input` and adds to `residual`; kPost still needs a norm after the add.
NormOrder norm_order(torch::jit::Value* input, torch::jit::Value* residual);

// The norm behind `sum`, as in a post-norm block, seen through casts and copies; null when there is none, or when
// others read `sum` too.
torch::jit::Node* norm_after(torch::jit::Value* sum);

}  // namespace torchgraft
