#pragma once

#include <torchgraft/patch/module/adapter_bank.h>

#include <torch/csrc/jit/api/module.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// A trainable adapter's submodule of a slot, or of the container of what weights are computed from at a place of a
// Reparametrisation: "self_prefix_source", "layer_0_output_adapter_source".
std::string own_module_name(const std::string& adapter);
constexpr const char* kSourceSuffix = "_source";

// Position of `name` among the adapters of an `adapters` submodule; throws as find_adapter does.
size_t find_adapter(const torch::jit::Module& adapters_module, const std::string& name, const char* what);

// The `adapters` submodule: layer_<i>.<slot name>.<parameter>, for trainable adapters
// layer_<i>.<slot name>.adapter_<name>.<parameter> and <place>_source.adapter_<name>.<parameter>; the adapters' names
// and configs, and the methods behind activate() and forward_with_gates(). `unit` is the compilation unit of the module
// that it will belong to.
torch::jit::Module make_adapters_module(const std::vector<Adapter>& adapters, const std::vector<Slot>& slots,
                                        const std::vector<SlotRun>& runs,
                                        const std::shared_ptr<torch::jit::CompilationUnit>& unit);

}  // namespace torchgraft
