#include "binding.h"

#include <torchgraft/patch/quantize.h>

#include <torch/csrc/jit/python/pybind.h>

#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace torchgraft_python {
namespace {

using torch::jit::Module;

// The module, its linear maps, and warnings.
using QuantizedModule = std::tuple<Module, std::vector<py::dict>, std::vector<std::string>>;

template <typename Make>
QuantizedModule quantized_with_warnings(const Make& make) {
  WarningCollector warnings;
  torchgraft::Quantized made;
  {
    const py::gil_scoped_release no_gil;
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    made = make();
  }
  std::vector<py::dict> maps;
  for (const torchgraft::LinearMapReport& map : made.maps) {
    py::dict entry;
    entry["path"] = map.path;
    entry["roles"] = py::tuple(py::cast(map.roles));
    entry["out_features"] = map.out_features;
    entry["in_features"] = map.in_features;
    entry["kept"] = map.kept;
    maps.push_back(entry);
  }
  return {std::move(made.module), std::move(maps), warnings.messages()};
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize", [](const Module& module, const std::vector<std::string>& skip) {
    return quantized_with_warnings([&] { return torchgraft::quantize(module, {skip}); });
  });
  m.def("quantization_probe", [](const Module& module, const std::vector<std::string>& skip) {
    return quantized_with_warnings([&] { return torchgraft::quantization_probe(module, {skip}); });
  });
}

}  // namespace torchgraft_python
