#pragma once

#include <torchgraft/patch/sites/site_finder.h>

#include <string>

namespace torchgraft {

// The note on a layer that has an attention and no feed-forward block.
inline const std::string kNoFeedForward =
    "no feed-forward block (linear, activation, linear, residual add) follows its attention";

// Fills the feed-forward block of `layer`, whose attention is known: linear, activation, linear, residual add, with two
// linear maps at its entry when it is gated. It stands beside the attention (parallel blocks read one norm), else
// behind the attention's sum. Notes why there is none.
void find_feed_forward(SiteFinder& finder, Layer& layer, LayerSites& sites);

}  // namespace torchgraft
