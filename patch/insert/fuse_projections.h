#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// linear(x, weight, bias) becomes one op with the only one that uses its result: with a gated_lora on the same x a
// gated_lora_linear, which reads x once; as the residual of a gated_bottleneck (a parallel one) a
// gated_bottleneck_linear. The results stay as they are, up to rounding. Returns how many there are.
size_t fuse_projections(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
