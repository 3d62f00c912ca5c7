#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/life.h>

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
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

// A module, and what the function that made it warns of.
using Result = std::pair<torch::jit::Module, std::vector<std::string>>;

// Calls `make` while other Python threads run.
template <typename Make>
Result with_warnings(const Make& make) {
  const pybind11::gil_scoped_release no_gil;
  WarningCollector warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  torch::jit::Module module = make();
  return {std::move(module), warnings.messages()};
}

// The same of what makes no module: returns the messages.
template <typename Do>
std::vector<std::string> messages_of(const Do& act) {
  const pybind11::gil_scoped_release no_gil;
  WarningCollector warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  act();
  return warnings.messages();
}

// Positional and named arguments of forward.
using Example = std::optional<std::pair<pybind11::tuple, pybind11::dict>>;

// forward's arguments without self, defaults filled in, of Python's `arguments` and `named`. Throws what a call of
// forward throws.
std::vector<c10::IValue> example_of(const torch::jit::Module& module, const pybind11::tuple& arguments,
                                    const pybind11::dict& named);
torchgraft::VerifyOptions verifying_of(const torch::jit::Module& module, bool verify, const Example& example);

// Adds compositions and AdapterFusion to the module.
void bind_compositions(pybind11::module_& m);

// Adds AdapterPool and Lease to the module.
void bind_adapter_pool(pybind11::module_& m);

// Adds quantize and quantization_probe to the module.
void bind_quantize(pybind11::module_& m);

}  // namespace torchgraft_python
