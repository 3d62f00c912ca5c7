#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Unrolls loops that hold an attention, at any depth, and run a known number of times:
//   for i in range(4): x = self.layer(x)
// Each run becomes a layer of its own that reads the shared weights. The loop's counter is a constant in every copy;
// conditions on it fold when the graph is simplified. All other loops stay.
void unroll_loops(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
