#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Checks a grafted module: its graphs are well-formed, hold exactly `ops` ops, and survive saving and loading (on
// a copy without weights, so that a large model costs nothing). Throws c10::Error: a failure is a bug of torchgraft's.
void verify_grafted(const torch::jit::Module& module, size_t ops);

}  // namespace torchgraft
