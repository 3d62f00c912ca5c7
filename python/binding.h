#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/graft.h>

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// Shared by the sources of the binding. Python passes adapters as plain tuples.
namespace torchgraft_python {

// A head: (text of head_config.json, state dict, the head's name in it).
using Head = std::tuple<std::string, std::map<std::string, at::Tensor>, std::string>;
// An adapter: (name, config as config_of() reads it, AdapterHub state dict, the adapter's name in it, trainable, head).
using Spec = std::tuple<std::string, std::string, std::optional<std::map<std::string, at::Tensor>>, std::string, bool,
                        std::optional<Head>>;

// Keeps the messages of TORCH_WARN on this thread, for Python's warnings.
class WarningCollector : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { messages_.push_back(warning.msg()); }
  const std::vector<std::string>& messages() const { return messages_; }

 private:
  std::vector<std::string> messages_;
};

// Reads a configuration from JSON, or from a name that may have values: "lora[r=16]".
torchgraft::AdapterConfig config_of(const std::string& text);
torchgraft::AdapterSpec spec_of(const Spec& spec);

// Adds AdapterPool and Lease to the module.
void bind_adapter_pool(pybind11::module_& m);

// Adds quantize and quantization_probe to the module.
void bind_quantize(pybind11::module_& m);

}  // namespace torchgraft_python
