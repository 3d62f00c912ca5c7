#pragma once

#include <torchgraft/plan/module_weights.h>

namespace torchgraft {

// `sources` in the dtype and on the device of `options`, without empty places.
Reparametrisation converted(Reparametrisation sources, const at::TensorOptions& options);

// Brings weights into the dtype of `options`, whole numbers excepted, and onto its device.
void convert(ModuleWeights& weights, const at::TensorOptions& options);

// Whether a source of weights is trained. What an orthogonal projection starts from (reft_weights.h) is not.
bool is_trained_source(const std::string& name);

}  // namespace torchgraft
