#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Copies `module` with its types and methods, so that the copy's methods may be rewritten. The copy's parameters are
// new tensors on the same memory: a copy costs no second set of weights, and moving or converting it leaves `module`
// alone, but writing into a weight writes into both. Buffers and other attributes are copied. Tied weights stay tied;
// torch::jit::Module::clone would make several tensors of them.
torch::jit::Module clone_module(const torch::jit::Module& module);

}  // namespace torchgraft
