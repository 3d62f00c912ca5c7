#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Replaces every torchgraft:: op by the ATen calls that define it in the op's header, for hosts that can load no custom
// library. Each op then costs what its formula says: prefixes are concatenated with the keys, and banks are gathered.
void decompose_adapters(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
