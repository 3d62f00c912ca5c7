#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Moves what both sides of an `if` compute alike to before it, where a linear map is among it: keys that a decoder
// projects on either side of `if past is not None:`. Leaves branches alone that write in place.
void hoist_common_steps(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
