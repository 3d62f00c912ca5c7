#pragma once

#include <torchgraft/plan/module_weights.h>

namespace torchgraft {

// `sources` in the dtype and on the device of `options`, without empty places.
Reparametrisation converted(Reparametrisation sources, const at::TensorOptions& options);

}  // namespace torchgraft
