#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes softmax where it is spelled in other ways, over one dimension:
//   exp(log_softmax(x))
//   e / sum(e) with e = exp(x)
//   softmax(x - max(x)), or exp(x - max(x)) in the above, with amax or the values of max
// Attention then shows. Leaves alone what something writes into.
void raise_softmax(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
