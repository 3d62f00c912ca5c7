#include "binding.h"

#include <torchgraft/config/composition_string.h>
#include <torchgraft/config/composition_tasks.h>
#include <torchgraft/patch/compose.h>
#include <torchgraft/patch/fusion.h>
#include <torchgraft/patch/head.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/train.h>

#include <torch/csrc/jit/python/pybind.h>

#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace torchgraft_python {

using torch::jit::Module;

void bind_compositions(py::module_& m) {
  m.def("compose", [](const Module& module, const std::string& name, const std::string& composition, bool verify,
                      const Example& example) {
    const auto verifying = verifying_of(module, verify, example);
    return with_warnings(
        [&] { return torchgraft::compose(module, name, torchgraft::composition_from_json(composition), verifying); });
  });
  m.def("task_ids", &torchgraft::task_ids);
  m.def("composition_from_string", [](const std::string& text) {
    return torchgraft::composition_to_json(torchgraft::composition_from_string(text));
  });
  m.def("composition_to_string", [](const std::string& json) {
    return torchgraft::composition_to_string(torchgraft::composition_from_json(json));
  });
  m.def("is_composition_text", [](const std::string& text) { return torchgraft::is_composition_text(text); });
  m.def("normalised_composition", [](const std::string& json) {
    const torchgraft::Composition read = torchgraft::composition_from_json(json);
    torchgraft::check_tasks(read, "load_adapter_setup");
    return torchgraft::composition_to_json(torchgraft::normalised(read));
  });
  m.def(
      "add_adapter_fusion",
      [](const Module& module, const std::string& fuse, const std::string& config, bool trainable) {
        return torchgraft::add_adapter_fusion(module, torchgraft::composition_from_json(fuse),
                                              torchgraft::fusion_config_from_json(config), trainable);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("fusion_regularization_loss", &torchgraft::fusion_regularization_loss,
        py::call_guard<py::gil_scoped_release>());
  m.def("check_replaces_fusion", &torchgraft::check_replaces_fusion);
  m.def("composition_head_files", [](const Module& module, const std::string& name, const std::string& model_class) {
    const torchgraft::AdapterFiles files = torchgraft::composition_head_files(module, name, model_class);
    return std::pair(files.head_config, files.head_weights);
  });
  m.def(
      "load_head",
      [](const Module& module, const std::string& name, const std::string& config, const torchgraft::StateDict& weights,
         const std::string& saved_name) {
        return torchgraft::load_head(module, name, {torchgraft::head_config_from_json(config), weights, saved_name});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "load_adapter_fusion",
      [](const Module& module, const std::string& config, const torchgraft::StateDict& weights,
         const std::string& name) {
        return torchgraft::load_adapter_fusion(module, torchgraft::fusion_config_from_json(config), weights, name);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("save_adapter_fusion", &torchgraft::save_adapter_fusion, py::call_guard<py::gil_scoped_release>());
  m.def("fusion_names_of",
        [](const std::string& json) { return torchgraft::fusion_names(torchgraft::composition_from_json(json)); });
  m.def("remove_adapter_fusion", &torchgraft::remove_adapter_fusion, py::call_guard<py::gil_scoped_release>());
  m.def("list_adapter_fusions", [](const Module& module) {
    std::vector<std::string> names;
    for (const torchgraft::FusionConfig& config : torchgraft::list_adapter_fusions(module)) {
      names.push_back(config.name);
    }
    return names;
  });
}

}  // namespace torchgraft_python
