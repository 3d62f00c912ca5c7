#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// A write into a tensor from outside, such as a cache among forward's arguments or the module's buffers, stays: callers
// may look at it. What reads the tensor behind the write then reads the writer's result, which is that tensor, so that
// data flow shows what was written. Writes into slices become index_copy_ of the whole.
void follow_writes(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
