#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Copies `module` with its types and methods, so that the copy's methods may be rewritten. The copy's parameters are
// new tensors on the same memory: a copy costs no second set of weights, and moving or converting it leaves `module`
// alone, but writing into a weight writes into both. Buffers and other attributes are copied. Tied weights and shared
// submodules stay shared; torch::jit::Module::clone would make several of them.
//
// The copy's types stand in a compilation unit of its own, which goes with the copy. torch::jit::Module::clone would
// add them to the unit of `module`, where they stay as long as anything of it. The unit of `module` stays as long as
// the copy, whose methods may call its functions; that of a `module` that is such a copy need not.
torch::jit::Module clone_module(const torch::jit::Module& module);

// Throws c10::Error, on behalf of the function `what`, when `module` or a submodule has forward hooks: a copy has none.
void check_no_hooks(const torch::jit::Module& module, const char* what);

}  // namespace torchgraft
