#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/compositions.h>

#include <torch/csrc/jit/api/module.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// The submodule that holds a trainable adapter's own weights in a slot, or in a container of sources.
std::string own_module_name(const std::string& adapter);

// A container of sources is called like their key in a Reparametrisation, with this suffix: "self_prefix_source",
// "layer_0_output_adapter_source".
constexpr const char* kSourceSuffix = "_source";

// The buffer of an `adapters` submodule whose adapters pool their gates in both ways: bool [N + 1], whether adapter n
// pools over all tokens. The last is for rows without an adapter.
constexpr const char* kPoolsAll = "pools_all";
at::Tensor pools_all(const std::vector<Adapter>& adapters);

// The names of the adapters of an `adapters` submodule, in the order of their ids.
std::vector<std::string> adapter_names(const torch::jit::Module& adapters_module);

// Position of `name` among the adapters of an `adapters` submodule; throws as find_adapter does.
size_t find_adapter(const torch::jit::Module& adapters_module, const std::string& name, const char* what);

// The id of an adapter or a composition of an `adapters` submodule; throws as find_adapter does.
int64_t find_id(const torch::jit::Module& adapters_module, const std::string& name, const char* what);

// Makes the `adapters` submodule: banks layer_<i>.<slot name>.<parameter>; for trainable adapters
// layer_<i>.<slot name>.adapter_<name>.<parameter> and <key>_source.adapter_<name>.<parameter>; the adapters' names and
// configs, and the methods behind activate() and forward_with_gates(). `unit` is the compilation unit of the module
// that gets it.
torch::jit::Module make_adapters_module(const std::vector<Adapter>& adapters, const std::vector<Slot>& slots,
                                        const std::vector<SlotRun>& runs,
                                        const std::shared_ptr<torch::jit::CompilationUnit>& unit,
                                        const std::vector<NamedComposition>& compositions = {});

}  // namespace torchgraft
