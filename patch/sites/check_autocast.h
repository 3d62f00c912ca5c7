#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Throws c10::Error, naming the layer and a remedy, where an attention or a projection to it stands in a scripted `with
// torch.autocast` of the device on which the weights are: TorchScript casts what its own operators read there, and not
// what an adapter's operator reads, so that every run would fail.
void check_autocast(const GraphSites& sites, torch::jit::Graph& graph, c10::Device device);

}  // namespace torchgraft
