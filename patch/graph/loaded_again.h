#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Saves `module` and loads it, in memory and with weights that share one element: nothing runs the result. Throws, with
// `what` in front, when a file of `module` cannot be loaded: TorchScript prints graphs that it does not compile.
torch::jit::Module loaded_again(const torch::jit::Module& module, const char* what);

}  // namespace torchgraft
