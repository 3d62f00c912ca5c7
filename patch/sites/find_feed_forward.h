#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <string>

namespace torchgraft {

// The note on a layer that has an attention and no feed-forward block.
inline const std::string kNoFeedForward =
    "no feed-forward block (linear, activation, linear, residual add) follows its attention";

// Finds the feed-forward block of `layer`, whose attention is known: linear, activation, linear, residual add; a gated
// block has two linear maps at its entry. Looks beside the attention first (parallel blocks read one norm), then behind
// the attention's sum. Notes why the layer has none.
void find_feed_forward(SiteFinder& finder, Layer& layer, LayerSites& sites);

}  // namespace torchgraft
