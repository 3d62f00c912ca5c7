#include <torchgraft/patch/train.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>

namespace torchgraft {

using torch::jit::Module;

namespace {

Module with_trainable(const Module& module, const std::string& name, bool trainable, const char* what) {
  Draft draft = open_grafted(module, what);
  Adapter& adapter = draft.adapters[find_plain(draft, name, what)];
  adapter.trainable = trainable;
  if (trainable) {
    restore_reft_sources(adapter);
    check_can_train(adapter);
  } else {
    adapter.sources.clear();
  }
  return build(std::move(draft), active_name(module));
}

// Whether the parameter at `path` ("layer_0.self_prefix.adapter_<name>.gate_bias") belongs to the adapter `name`.
bool belongs_to(const std::string& path, const std::string& name) {
  std::string part = own_module_name(name);
  part.insert(part.begin(), '.');
  part.push_back('.');
  return path.find(part) != std::string::npos;
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(const Module& module, const std::string& name) {
  check_grafted(module, "trainable_parameters");
  const Module adapters = module.attr("adapters").toModule();
  find_adapter(adapters, name, "trainable_parameters");
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (const auto& parameter : adapters.named_parameters()) {
    if (belongs_to(parameter.name, name)) {
      result.emplace_back("adapters." + parameter.name, parameter.value);
    }
  }
  TORCH_CHECK(!result.empty(), "trainable_parameters: '", name,
              "' is frozen; graft or load it as a trainable adapter, or call unfreeze_adapter");
  return result;
}

Module freeze_adapter(const Module& module, const std::string& name) {
  return with_trainable(module, name, /*trainable=*/false, "freeze_adapter");
}

Module unfreeze_adapter(const Module& module, const std::string& name) {
  return with_trainable(module, name, /*trainable=*/true, "unfreeze_adapter");
}

}  // namespace torchgraft
