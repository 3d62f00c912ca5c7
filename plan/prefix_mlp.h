#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <ATen/core/Tensor.h>

#include <utility>

namespace torchgraft {

// The reparametrisation of a prefix (Li & Liang 2021; PrefixTuning of the adapters library), shared by the layers of a
// group: embeddings [P, H] -> down [M, H] -> non-linearity -> up [L 2 h d, M]. Its weights are "embeddings",
// "down_weight", "down_bias", "up_weight" and "up_bias".

// The MLP's output [P, L 2 h d], which a flat prefix stores directly.
at::Tensor eject(const ModuleWeights& mlp, const std::string& non_linearity);

// One layer's keys and values, [h, P, d] each, out of the output for all L layers of the group.
std::pair<at::Tensor, at::Tensor> prefix_of_layer(const at::Tensor& ejected, const PlannedPrefix& prefix);

}  // namespace torchgraft
