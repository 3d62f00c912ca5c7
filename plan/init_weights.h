#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/registration/export.h>

#include <ATen/core/Tensor.h>

namespace torchgraft {

// Draws fresh weights with the adapters library's distributions (init_weights, init_weights_seed) from the default CPU
// generator, so that at::manual_seed makes them repeatable; in the dtype and on the device of `options`. `kept`, if
// given, gets what the weights are computed from.
TORCHGRAFT_PATCH_API AdapterWeights init_weights(const Plan& plan, const at::TensorOptions& options,
                                                 Reparametrisation* kept = nullptr);

}  // namespace torchgraft
