#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Makes one op of linear(x, weight, bias) and the adapter op that alone reads its result: a gated_lora on the same x
// becomes gated_lora_linear, which reads x once; a gated_bottleneck whose residual it is (a parallel one) becomes
// gated_bottleneck_linear. Results are the same, up to rounding. Returns the number of fused ops.
size_t fuse_projections(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
