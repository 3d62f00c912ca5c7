#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// torch.jit.optimize_for_inference runs convolutions on the CPU in oneDNN's own layout:
//   to_mkldnn(x); prim::mkldnn_convolution(., constants in that layout); to_dense(.)
// This pass replaces them by aten::convolution on dense constants, because torch cannot save the others. Throws
// c10::Error, with the remedy, for any other op in that layout.
void raise_mkldnn_convolution(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
