#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Finds the ends of layers (LayerSites::end, Layer::has_end), and says where there is none (Layer::end_note). The end
// is the sum behind a layer's last block, or its norm in post-norm models. It is proven: nothing else of the layer is
// read behind it, and the next layer's queries are made of it. There is none where the adapters library does not
// count the positions of ReFT by this layer's tokens: in models of an encoder and a decoder, in several stacks of
// layers, and behind a cache.
void find_layer_ends(GraphSites& sites, torch::jit::Graph& graph);

}  // namespace torchgraft
