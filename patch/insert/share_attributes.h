#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Lets operators share what each of them reads of the submodule `adapters`, which no forward assigns. What stands above
// a branch is shared by nodes in it, so that branches of compositions define little: TorchScript compiles a module from
// its file in a time that grows with what single branches define.
void share_attributes(torch::jit::Graph& graph);

}  // namespace torchgraft
