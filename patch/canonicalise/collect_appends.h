#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Makes one ListConstruct of a list to which a straight run of nodes appends, such as the caches that a decoder gives
// back. PyTorch's RemoveListMutation leaves those to which it cannot move the construction: what is appended last may
// be written in place, and alias analysis takes all elements of a list for one memory.
void collect_appends(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
