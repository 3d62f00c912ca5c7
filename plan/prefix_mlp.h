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

// Throws c10::Error where the layers of a group have keys and values of different sizes, which one MLP cannot make.
void check_prefix_groups(const Plan& plan);

// Files of 0.1.0 have one MLP for both towers of a CLIP. Gives each tower a copy, with the outputs for its layers: the
// prefixes stay the same.
void split_by_tower(const Plan& plan, const Structure& structure, Reparametrisation& sources);

}  // namespace torchgraft
