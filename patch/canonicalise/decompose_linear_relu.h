#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes quantized::linear_relu_dynamic, and the same with float16 weights, as the linear map and aten::relu: adapters
// act between the two. The results are the same numbers.
void decompose_linear_relu(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
