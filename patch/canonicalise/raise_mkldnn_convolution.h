#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// torch.jit.optimize_for_inference runs convolutions on the CPU in oneDNN's own layout:
//   to_mkldnn(x); prim::mkldnn_convolution(., constants in that layout); to_dense(.)
// becomes aten::convolution on dense constants: torch cannot save the other. Raises an error that names any other op
// of that kind, and the remedy.
void raise_mkldnn_convolution(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
