#pragma once

#include <torchgraft/patch/adapter_bank.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Checks a grafted module: its graphs are well-formed, hold exactly one op per slot, and survive saving and loading (on
// a copy without weights, so that a large model costs nothing). Throws c10::Error: a failure is a bug of torchgraft's.
void verify_grafted(const torch::jit::Module& module, const std::vector<BankSlot>& slots);

}  // namespace torchgraft
