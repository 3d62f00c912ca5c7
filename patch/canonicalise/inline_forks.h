#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Puts what torch.jit.fork runs where it is forked, if every fork's result is only waited for.
void inline_forks(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
