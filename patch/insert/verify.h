#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Checks that the graphs of a grafted module are well-formed, hold exactly `ops` ops, and survive saving and loading.
// Throws c10::Error: a failure is a bug in torchgraft.
void verify_grafted(const torch::jit::Module& module, size_t ops);

}  // namespace torchgraft
