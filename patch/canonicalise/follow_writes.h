#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes into tensors from outside (a cache among forward's arguments, a buffer) stay, since callers may look at them.
// Nodes behind a write then read the writer's result, so that data flow shows what was written. Writes into slices
// become index_copy_ of the whole.
void follow_writes(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
