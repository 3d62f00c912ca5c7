#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Rewrites norms over the last dimension that are written out, x / sqrt(mean(x^2) + eps) [* weight] and
// (x - mean(x)) / sqrt(var(x) + eps) [* weight] [+ bias], to one aten::rms_norm or aten::layer_norm each.
//
// A cast of x to float32 goes away: both ops compute in float32 inside when x has 16 bits. Where the result may have
// another dtype than x (x of 16 bits, float32 weight), a cast follows the norm, to the dtype that the elementary ops
// would have promoted to. Norms whose intermediate results are read elsewhere stay as they are.
void raise_norm(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
