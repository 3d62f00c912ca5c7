#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// linear(x, weight, bias) that only a gated_lora on the same x uses becomes, with it, one gated_lora_linear, which
// reads x once. The results stay as they are, up to rounding. Returns how many there are.
size_t fuse_projections(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
