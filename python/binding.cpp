// Python's binding of libtorchgraft_patch. It converts modules, strings and dicts, and has no logic of its own.

#include "binding.h"

#include <torchgraft/config/library_differences.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/patch/adapters/one_version.h>
#include <torchgraft/patch/base_digest.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/forward_inputs.h>
#include <torchgraft/patch/head.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/load_module.h>
#include <torchgraft/patch/optimize.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/text_limits.h>
#include <torchgraft/patch/train.h>
#include <torchgraft/patch/verify.h>
#include <torchgraft/plan/match_modules.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/temporary_file.h>
#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/library.h>
#include <torchgraft/registration/tensor_records.h>

#include <pybind11/functional.h>
#include <torch/csrc/jit/python/pybind.h>
#include <torch/csrc/jit/runtime/jit_exception.h>

#include <exception>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace torchgraft_python {

torchgraft::AdapterConfig config_of(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  const bool is_json = first != std::string::npos && text[first] == '{';
  return is_json ? torchgraft::config_from_json(text) : torchgraft::config_from_string(text);
}

torchgraft::AdapterSpec spec_of(const Spec& spec) {
  const auto& [name, config, weights, saved_name, trainable, head] = spec;
  torchgraft::AdapterSpec result{name, config_of(config), weights, saved_name, trainable};
  result.prefix_heads = torchgraft::saved_prefix_heads(config);
  if (head) {
    const auto& [head_config, head_weights, head_name] = *head;
    result.head = torchgraft::HeadSpec{torchgraft::head_config_from_json(head_config), head_weights, head_name};
  }
  return result;
}

std::vector<c10::IValue> example_of(const torch::jit::Module& module, const py::tuple& arguments,
                                    const py::dict& named) {
  const auto& schema = module.get_method("forward").function().getSchema();
  torch::jit::Stack stack =
      torch::jit::createStackForSchema(schema, torch::jit::tuple_slice(arguments), py::kwargs(named), module._ivalue());
  stack.erase(stack.begin());
  // The last argument of a grafted forward is its adapter_ids; a base may have one of its own.
  if (module.find_method("grafted_forward")) {
    stack.pop_back();
  }
  return stack;
}

torchgraft::VerifyOptions verifying_of(const torch::jit::Module& module, bool verify, const Example& example) {
  torchgraft::VerifyOptions result{verify};
  if (example) {
    result.example = example_of(module, example->first, example->second);
  }
  return result;
}

}  // namespace torchgraft_python

namespace {

using torch::jit::Module;
using torchgraft_python::config_of;
using torchgraft_python::Example;
using torchgraft_python::example_of;
using torchgraft_python::messages_of;
using torchgraft_python::Spec;
using torchgraft_python::spec_of;
using torchgraft_python::verifying_of;
using torchgraft_python::with_warnings;

// The edited sites that the JSON text describes. Empty text: none, the patcher detects them.
std::optional<torchgraft::Structure> sites_of(const std::string& json) {
  return json.empty() ? std::nullopt : std::optional(torchgraft::structure_from_json(json));
}

std::vector<py::dict> list_adapters(const Module& module) {
  std::vector<py::dict> result;
  for (const torchgraft::AdapterInfo& info : torchgraft::list_adapters(module)) {
    py::dict entry;
    entry["name"] = info.name;
    entry["config"] = info.config;
    entry["active"] = info.active;
    entry["merged"] = info.merged;
    entry["trainable"] = info.trainable;
    entry["gate_pooling"] = info.gate_pooling;
    entry["parameters"] = info.parameters;
    entry["bytes"] = info.bytes;
    entry["by_location"] = info.by_location;
    entry["composition"] = info.composition;
    result.push_back(entry);
  }
  return result;
}

void set_graft_error(const std::string& message) {
  const py::object type = py::module_::import("torchgraft.errors").attr("GraftError");
  PyErr_SetString(type.ptr(), message.c_str());
}

// The message of a failed `assert` in a method, without TorchScript's traceback and class name.
std::string message_of(const torch::jit::JITException& error) {
  const std::string text = error.getOriginalMsg().value_or(error.what());
  const std::string_view prefix = "AssertionError: ";
  return text.starts_with(prefix) ? text.substr(prefix.size()) : text;
}

// c10::Error carries a C++ stack; a user needs only the message.
void translate_error(std::exception_ptr exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const c10::Error& error) {
    set_graft_error(error.what_without_backtrace());
  } catch (const torch::jit::JITException& error) {
    set_graft_error(message_of(error));
  }
}

// What hosts of text encoders need: error_text.h, forward_inputs.h.
void bind_text(py::module_& m) {
  m.def("one_line", [](const std::string& message) { return torchgraft::one_line(message); });
  m.def(
      "text_limits",
      [](const Module& module) {
        const torchgraft::TextLimits limits = torchgraft::text_limits(module);
        return std::pair(limits.vocabulary, limits.positions);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("text_fault",
        [](std::optional<int64_t> vocabulary, std::optional<int64_t> positions,
           const std::vector<int64_t>& ids) -> std::optional<std::pair<bool, std::string>> {
          const auto fault = torchgraft::text_fault({vocabulary, positions}, ids);
          return fault ? std::optional(std::pair(fault->is_too_long, fault->message)) : std::nullopt;
        });
  using torchgraft::ForwardInputs;
  py::class_<ForwardInputs>(m, "ForwardInputs")
      .def(py::init<const c10::FunctionSchema&>())
      .def_property_readonly("takes_mask", &ForwardInputs::takes_mask)
      .def(
          "arguments",
          [](const ForwardInputs& inputs, const at::Tensor& ids, const std::optional<at::Tensor>& mask,
             const std::optional<at::Tensor>& types) {
            return inputs.arguments({ids, mask.value_or(at::Tensor()), types.value_or(at::Tensor())});
          },
          py::arg("ids"), py::arg("mask") = std::nullopt, py::arg("types") = std::nullopt);
}

// Long calls let other Python threads run.
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_grafting(py::module_& m) {
  m.def(
      "graft",
      [](const Module& module, const std::vector<Spec>& adapters, const std::string& gate_pooling,
         const std::string& token_mask_input, const std::string& active, bool verify, const std::string& sites,
         bool fuse, bool allow_partial, const Example& example, const std::map<std::string, std::string>& rename) {
        torchgraft::GraftOptions options{gate_pooling, token_mask_input, active, sites_of(sites), verify, fuse};
        options.allow_partial = allow_partial;
        options.rename = rename;
        if (example) {
          options.example = example_of(module, example->first, example->second);
        }
        return with_warnings([&] {
          std::vector<torchgraft::AdapterSpec> specs;
          for (const Spec& spec : adapters) {
            specs.push_back(spec_of(spec));
          }
          return torchgraft::graft(module, specs, options);
        });
      },
      py::arg("module"), py::arg("adapters"), py::arg("gate_pooling"), py::arg("token_mask_input"), py::arg("active"),
      py::arg("verify"), py::arg("sites") = "", py::arg("fuse") = true, py::arg("allow_partial") = false,
      py::arg("example") = std::nullopt, py::arg("rename") = std::map<std::string, std::string>());
  m.def(
      "inspect",
      [](const Module& module, const std::string& sites) {
        return torchgraft::to_json(torchgraft::inspect(module, sites_of(sites)));
      },
      py::arg("module"), py::arg("sites") = "", NoGil());
  m.def("canonical_module", &torchgraft::canonical_module);
  m.def("lora_sites_by_number", [](const std::string& structure, const std::string& path) {
    return torchgraft::lora_sites_by_number(torchgraft::structure_from_json(structure), path);
  });
}

void bind_life(py::module_& m) {
  m.def("list_adapters", &list_adapters);
  m.def("base_digest", &torchgraft::base_digest, NoGil());
  m.def("remove_adapters", &torchgraft::remove_adapters, NoGil());
  m.def("rename_adapter", &torchgraft::rename_adapter, NoGil());
  m.def(
      "replace_adapter",
      [](const Module& module, const Spec& spec) { return torchgraft::replace_adapter(module, spec_of(spec)); },
      NoGil());
  m.def("trainable_parameters", &torchgraft::trainable_parameters);
  m.def("freeze_adapter", &torchgraft::freeze_adapter, NoGil());
  m.def("unfreeze_adapter", &torchgraft::unfreeze_adapter, NoGil());
}

// Changes that are compared with the module before them.
void bind_verified(py::module_& m) {
  m.def("average_adapters",
        [](const Module& module, const std::string& name, const std::vector<std::string>& names,
           const std::vector<double>& weights, bool normalise, bool verify, const Example& example) {
          const auto verifying = verifying_of(module, verify, example);
          return with_warnings(
              [&] { return torchgraft::average_adapters(module, name, names, weights, normalise, verifying); });
        });
  m.def("merge_adapter",
        [](const Module& module, const std::string& name, bool into_base, bool verify, const Example& example) {
          const torchgraft::MergeOptions options{into_base, verifying_of(module, verify, example)};
          return with_warnings([&] { return torchgraft::merge_adapter(module, name, options); });
        });
  m.def("unmerge_adapter", [](const Module& module, const std::string& name, bool verify, const Example& example) {
    const auto verifying = verifying_of(module, verify, example);
    return with_warnings([&] { return torchgraft::unmerge_adapter(module, name, verifying); });
  });
  m.def("lower", [](const Module& module, bool verify, const Example& example) {
    const auto verifying = verifying_of(module, verify, example);
    return with_warnings([&] { return torchgraft::lower(module, verifying); });
  });
  m.def("optimize", [](const Module& module, bool exact_base, bool verify, const Example& example) {
    const torchgraft::OptimizeOptions options{exact_base, verifying_of(module, verify, example)};
    return with_warnings([&] { return torchgraft::optimize(module, options); });
  });
  m.def("ungraft", [](const Module& module, bool verify, const Example& example) {
    const auto verifying = verifying_of(module, verify, example);
    return with_warnings([&] { return torchgraft::ungraft(module, verifying); });
  });
  m.def("verify", [](const Module& module, const Example& example) {
    const auto arguments = verifying_of(module, true, example).example;
    const py::gil_scoped_release no_gil;
    return torchgraft::verify(module, arguments);
  });
}

void bind_files(py::module_& m) {
  m.def("check_tensor_records", &torchgraft::check_tensor_records, NoGil());
  m.def("load_adapter", [](const Module& module, const Spec& spec) {
    return with_warnings([&] { return torchgraft::load_adapter(module, spec_of(spec)); });
  });
  m.def("match_adapter", [](const Module& module, const Spec& spec) {
    std::vector<std::pair<std::string, std::string>> result;
    for (const torchgraft::WeightMatch& match : torchgraft::match_adapter(module, spec_of(spec))) {
      result.emplace_back(match.key, match.place);
    }
    return result;
  });
  m.def("adapter_files", [](const Module& module, const std::string& name, const std::string& model_class) {
    torchgraft::AdapterFiles files;
    const auto messages = messages_of([&] { files = torchgraft::adapter_files(module, name, model_class); });
    return std::tuple(files.config, files.weights, files.head_config, files.head_weights, messages);
  });
  m.def("save_adapter", [](const Module& module, const std::string& name, const std::string& directory,
                           const std::string& model_class, bool overwrite) {
    return messages_of([&] { torchgraft::save_adapter(module, name, directory, model_class, overwrite); });
  });
  m.def("check_replaces", &torchgraft::check_replaces, NoGil());
  // contents: the new files by name. adapter: whose directory it has to be; empty: any. check: may throw. See
  // DirectoryUpdate.
  m.def("update_directory", [](const std::string& directory, const std::map<std::string, py::bytes>& contents,
                               const std::vector<std::string>& obsolete, const std::string& marker,
                               const std::string& adapter, const std::function<void()>& check) {
    const std::map<std::string, std::string_view> views(contents.begin(), contents.end());
    const py::gil_scoped_release no_gil;
    torchgraft::DirectoryUpdate update(directory, marker, [&] {
      if (!adapter.empty()) {
        torchgraft::check_replaces(directory, adapter);
      }
      if (check) {
        check();
      }
    });
    for (const auto& [name, content] : views) {
      update.stage(name, content);
    }
    update.commit(obsolete);
  });
  m.def("read_one_version", &torchgraft::read_one_version, NoGil());
  m.def(
      "write_safetensors",
      [](const torchgraft::StateDict& tensors, const std::string& path) {
        torchgraft::write_safetensors(tensors, path);
      },
      NoGil());
  m.def("read_safetensors", &torchgraft::read_safetensors, py::arg("path"),
        py::arg("most_bytes") = torchgraft::kMostWeightBytes, NoGil());
}

// `with TemporaryFile(target) as file:` deletes the file at the block's end unless keep() was called.
class FileBlock {
 public:
  explicit FileBlock(const std::string& target) : file_(std::in_place, target) {}

  torchgraft::TemporaryFile& file() {
    TORCH_CHECK(file_, "TemporaryFile: expected to be used within its `with` block");
    return *file_;
  }
  void end() { file_.reset(); }

 private:
  std::optional<torchgraft::TemporaryFile> file_;
};

void bind_temporary_file(py::module_& m) {
  py::class_<FileBlock>(m, "TemporaryFile")
      .def(py::init<const std::string&>(), NoGil())
      .def("__enter__", [](FileBlock& block) -> FileBlock& { return block; })
      .def("__exit__", [](FileBlock& block, const py::args&) { block.end(); })
      .def("write",
           [](FileBlock& block, const py::buffer& content) {
             const py::buffer_info bytes = content.request();
             const py::gil_scoped_release no_gil;
             block.file().write(bytes.ptr, static_cast<size_t>(bytes.size * bytes.itemsize));
           })
      .def("keep", [](FileBlock& block) { block.file().keep(); }, NoGil());
  m.def("remove_leftovers", &torchgraft::remove_leftovers, NoGil());
}

void bind_heads(py::module_& m) {
  m.def(
      "add_head",
      [](const Module& module, const std::string& name, const std::string& config, const std::string& token_mask) {
        return torchgraft::add_head(module, name, torchgraft::head_config_from_json(config), token_mask);
      },
      NoGil());
  m.def("remove_head", &torchgraft::remove_head, NoGil());
  m.def("head_config", &torchgraft::head_config, NoGil());
  m.def("is_known_head", &torchgraft::is_known_head);
}

void bind_configs(py::module_& m) {
  m.def("config_names", &torchgraft::config_names);
  m.def("config_from_name",
        [](const std::string& name) { return torchgraft::config_to_json(torchgraft::config_from_name(name)); });
  m.def("config_from_string",
        [](const std::string& text) { return torchgraft::config_to_json(torchgraft::config_from_string(text)); });
  m.def("normalise_config",
        [](const std::string& json) { return torchgraft::config_to_json(torchgraft::config_from_json(json)); });
  m.def("library_difference", [](const std::string& adapter_config) {
    const torchgraft::LibraryDifference difference = torchgraft::library_difference(adapter_config);
    return std::pair(difference.refused, difference.warned);
  });
  m.def("check_supported", [](const std::string& text) { torchgraft::check_supported(config_of(text)); });
}

void bind_kernel_mode(py::module_& m) {
  using torchgraft::ops::KernelMode;
  py::enum_<KernelMode>(m, "KernelMode")
      .value("AUTO", KernelMode::kAuto)
      .value("FUSED", KernelMode::kFused)
      .value("REFERENCE", KernelMode::kReference);
  m.def("kernel_mode", &torchgraft::ops::kernel_mode);
  m.def("kernel_instruction_set", &torchgraft::ops::kernel_instruction_set);
  m.def("set_kernel_mode", &torchgraft::ops::set_kernel_mode);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(&translate_error);
  m.def("version", &torchgraft::version);
  bind_grafting(m);
  bind_text(m);
  bind_life(m);
  bind_verified(m);
  bind_files(m);
  bind_temporary_file(m);
  bind_heads(m);
  bind_configs(m);
  bind_kernel_mode(m);
  torchgraft_python::bind_adapter_pool(m);
  torchgraft_python::bind_quantize(m);
  torchgraft_python::bind_compositions(m);
}
