#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <torch/csrc/jit/api/module.h>

#include <vector>

// The inverse of stack_banks (adapter_bank.h) and make_adapters_module (adapters_module.h).
namespace torchgraft {

// The weights of one adapter, cut out of the banks: one entry per module of its plan.
AdapterWeights read_row(const torch::jit::Module& adapters_module, size_t row, const Plan& plan);

// The configurations of a grafted module's adapters, whatever version of torchgraft wrote it: ask these, and not the
// `configs` that it holds.
std::vector<AdapterConfig> read_configs(const torch::jit::Module& adapters_module);

// The adapters of a grafted module's `adapters` submodule, unstacked.
std::vector<Adapter> read_adapters(const torch::jit::Module& adapters_module, const Structure& structure);

}  // namespace torchgraft
