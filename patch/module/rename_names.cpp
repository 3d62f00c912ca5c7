#include <torchgraft/patch/module/rename_names.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/loaded_again.h>
#include <torchgraft/patch/graph/module_methods.h>

#include <torch/csrc/jit/api/function_impl.h>

#include <algorithm>
#include <cctype>
#include <functional>

namespace torchgraft {
namespace {

using c10::Argument;
using c10::FunctionSchema;
using torch::jit::Function;
using torch::jit::Module;
using torch::jit::Node;

constexpr const char* kNames = "renamed";  // the attribute of `adapters`

bool is_name(const std::string& text) {
  const auto is_letter = [](unsigned char c) { return std::isalpha(c) || c == '_'; };
  return !text.empty() && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [&](unsigned char c) { return is_letter(c) || std::isdigit(c); });
}

bool has_argument(const Module& module, const std::string& name) {
  const auto& arguments = module.get_method("forward").function().getSchema().arguments();
  return std::any_of(arguments.begin() + 1, arguments.end(), [&](const Argument& a) { return a.name() == name; });
}

// Whether a file keeps `text` as the name of an attribute and of an argument: TorchScript has words of its own, and
// prints some names as others.
bool is_kept_in_files(const std::string& text) {
  try {
    Module probe("Probe");
    probe.register_attribute(text, c10::IntType::get(), 0);
    probe.define("def forward(self, " + text + ": int) -> int:\n    return " + text + " + self." + text + "\n");
    const Module again = loaded_again(probe, "graft");
    return again.hasattr(text) && has_argument(again, text);
  } catch (const std::exception&) {
    return false;
  }
}

bool has_name(const Module& module, const std::string& name) {
  return module.hasattr(name) || module.find_method(name) || has_argument(module, name);
}

// Calls `change` with each node whose first input is `module` itself and whose attribute `name` is `old`.
void for_each_use(const Module& module, const std::string& old, const std::function<void(Node*)>& change) {
  for_each_method(module, [&](const std::string&, const std::shared_ptr<torch::jit::Graph>& graph) {
    for_each_node(graph->block(), [&](Node* node) {
      const bool names_one = node->kind() == c10::prim::GetAttr || node->kind() == c10::prim::SetAttr ||
                             node->kind() == c10::prim::CallMethod;
      if (names_one && node->input(0)->type() == module.type() && node->s(c10::attr::name) == old) {
        change(node);
      }
    });
  });
}

void rename_attribute(Module& module, const std::string& old, const std::string& name) {
  const auto type = module.type();
  const size_t slot = type->getAttributeSlot(old);
  const c10::TypePtr held = type->getAttribute(slot);
  const bool is_parameter = type->is_parameter(slot);
  const bool is_buffer = type->is_buffer(slot);
  const c10::IValue value = module.attr(old);
  module._ivalue()->unsafeRemoveAttr(old);
  type->unsafeRemoveAttribute(old);
  module.register_attribute(name, held, value, is_parameter, is_buffer);
}

void rename_method(Module& module, const std::string& old, const std::string& name) {
  Function& function = module.get_method(old).function();
  const FunctionSchema schema = function.getSchema();
  const auto graph = torch::jit::toGraphFunction(function).graph();
  remove_method(module, old);
  add_method(module, name, graph, schema.arguments(), schema.returns());
}

void rename_argument(const Module& module, const std::string& old, const std::string& name) {
  Function& forward = module.get_method("forward").function();
  const FunctionSchema& schema = forward.getSchema();
  std::vector<Argument> arguments;
  for (const Argument& argument : schema.arguments()) {
    arguments.push_back(argument.name() != old ? argument
                                               : Argument(name, argument.type(), argument.N(), argument.default_value(),
                                                          argument.kwarg_only()));
  }
  forward.setSchema(FunctionSchema(schema.name(), schema.overload_name(), std::move(arguments), schema.returns()));
}

}  // namespace

void rename_names(Module& module, const NewNames& names) {
  for (const auto& [old, name] : names) {
    TORCH_CHECK(old != "forward" && has_name(module, old), "graft: rename: the module has no attribute, method or ",
                "argument of forward '", old, "' that can get another name");
    TORCH_CHECK(!has_name(module, name), "graft: rename: '", name, "', the new name of '", old,
                "', is taken; choose another");
    TORCH_CHECK(is_name(name) && is_kept_in_files(name), "graft: rename: '", name, "', the new name of '", old,
                "', is no name that TorchScript keeps in a file; choose another");
    const bool is_attribute = module.hasattr(old);
    const bool is_method = module.find_method(old).has_value();
    if (is_attribute || is_method) {
      const auto rename = [&new_name = name](Node* node) { node->s_(c10::attr::name, new_name); };
      for_each_use(module, old, rename);
    }
    if (has_argument(module, old)) {
      rename_argument(module, old, name);
    }
    if (is_attribute) {
      rename_attribute(module, old, name);
    }
    if (is_method) {
      rename_method(module, old, name);
    }
  }
}

NewNames names_in(const Module& module, const NewNames& names) {
  NewNames result = names;
  std::erase_if(result, [&](const auto& entry) { return !has_name(module, entry.first); });
  return result;
}

NewNames reversed(const NewNames& names) {
  NewNames result;
  for (const auto& [old, name] : names) {
    result.emplace(name, old);
  }
  return result;
}

NewNames remembered_names(const Module& grafted) {
  NewNames result;
  const Module adapters = grafted.attr("adapters").toModule();
  if (adapters.hasattr(kNames)) {
    for (const auto& entry : adapters.attr(kNames).toGenericDict()) {
      result.emplace(entry.key().toStringRef(), entry.value().toStringRef());
    }
  }
  return result;
}

void remember_names(Module& adapters, const NewNames& names) {
  if (names.empty()) {
    return;
  }
  c10::Dict<std::string, std::string> held;
  for (const auto& [old, name] : names) {
    held.insert(old, name);
  }
  adapters.register_attribute(kNames, c10::DictType::create(c10::StringType::get(), c10::StringType::get()), held);
}

}  // namespace torchgraft
