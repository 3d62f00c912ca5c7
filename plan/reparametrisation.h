#pragma once

#include <torchgraft/plan/module_weights.h>

namespace torchgraft {

// `sources` in `options`' dtype and device, without the places that have none.
Reparametrisation converted(Reparametrisation sources, const at::TensorOptions& options);

}  // namespace torchgraft
