#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/graft.h>

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>

// What the files of the binding share. Adapters cross the border as plain tuples.
namespace torchgraft_python {

// Of a head: (head_config.json, state dict, the head's name in it).
using Head = std::tuple<std::string, std::map<std::string, at::Tensor>, std::string>;
// (name, config as JSON or as a name, AdapterHub state dict, the adapter's name in it, trainable, head)
using Spec = std::tuple<std::string, std::string, std::optional<std::map<std::string, at::Tensor>>, std::string, bool,
                        std::optional<Head>>;

// JSON, or a name with values: "lora[r=16]".
torchgraft::AdapterConfig config_of(const std::string& text);
torchgraft::AdapterSpec spec_of(const Spec& spec);

// AdapterPool and its leases.
void bind_adapter_pool(pybind11::module_& m);

}  // namespace torchgraft_python
