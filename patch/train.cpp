#include <torchgraft/patch/train.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <string_view>

namespace torchgraft {

using torch::jit::Module;

namespace {

// The AdapterFusion layers of a composition.
void set_trainable(Draft& draft, const NamedComposition& composition, bool trainable, const char* what) {
  const std::vector<std::string> names = fusion_names(composition.tree);
  for (AdapterFusion& fusion : draft.fusions) {
    if (std::find(names.begin(), names.end(), fusion.name()) != names.end()) {
      fusion.trainable = trainable;
      if (trainable) {
        check_can_train(fusion.config, what);
      }
    }
  }
}

Module with_trainable(const Module& module, const std::string& name, bool trainable, const char* what) {
  Draft draft = open_grafted(module, what);
  if (const NamedComposition* composition = find_fused(draft.compositions, name)) {
    set_trainable(draft, *composition, trainable, what);
    return build(std::move(draft), active_name(module));
  }
  Adapter& adapter = draft.adapters[find_plain(draft, name, what)];
  for (const NamedComposition& composition : draft.compositions) {
    const std::vector<std::string> parts = adapters_in(composition.tree);
    const bool is_part = std::find(parts.begin(), parts.end(), name) != parts.end();
    TORCH_CHECK(!trainable || !is_part || fusion_names(composition.tree).empty(), what, ": the composition '",
                composition.name, "', ", composition_to_string(composition.tree), ", has a Fuse and uses '", name,
                "', and the adapters of such a composition stay frozen; remove the composition first");
  }
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

// Whether the parameter belongs to an adapter of a composition, or to its AdapterFusion layers.
bool is_within(const std::string& path, const NamedComposition& composition) {
  const std::vector<std::string> adapters = adapters_in(composition.tree);
  const std::vector<std::string> fusions = fusion_names(composition.tree);
  return std::any_of(adapters.begin(), adapters.end(),
                     [&](const std::string& adapter) { return belongs_to(path, adapter); }) ||
         std::any_of(fusions.begin(), fusions.end(),
                     [&](const std::string& fusion) { return path.starts_with(fusion_module_name(fusion) + "."); });
}

using Parameters = std::vector<std::pair<std::string, at::Tensor>>;

[[noreturn]] void refuse_frozen(const std::string& name, const Composition* composition, const char* what) {
  TORCH_CHECK(composition, what, ": '", name, "' is frozen; graft or load it as a trainable adapter, or call ",
              "unfreeze_adapter");
  const bool has_fuse = !fusion_names(*composition).empty();
  TORCH_CHECK(!has_fuse, what, ": '", name, "', ", composition_to_string(*composition), ", is frozen; call ",
              "unfreeze_adapter('", name, "') to train its AdapterFusion layers");
  TORCH_CHECK(false, what, ": '", name, "', ", composition_to_string(*composition), ", is frozen, for its adapters ",
              "are; call unfreeze_adapter for one of ", c10::Join(", ", adapters_in(*composition)));
}

Parameters parameters_of(const Module& module, const std::string& name, const char* what) {
  check_grafted(module, what);
  const Module adapters = module.attr("adapters").toModule();
  const std::vector<NamedComposition> compositions = read_compositions(adapters);
  const auto composition =
      std::find_if(compositions.begin(), compositions.end(), [&](const auto& held) { return held.name == name; });
  const bool is_composition = composition != compositions.end();
  if (!is_composition) {
    find_adapter(adapters, name, what);
  }
  Parameters result;
  for (const auto& parameter : adapters.named_parameters()) {
    if (belongs_to(parameter.name, name) || (is_composition && is_within(parameter.name, *composition))) {
      result.emplace_back("adapters." + parameter.name, parameter.value);
    }
  }
  if (result.empty()) {
    refuse_frozen(name, is_composition ? &composition->tree : nullptr, what);
  }
  return result;
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(const Module& module, const std::string& name) {
  return parameters_of(module, name, "trainable_parameters");
}

at::Tensor fusion_regularization_loss(const Module& module, const std::string& name) {
  constexpr double kWeight = 0.01;
  constexpr std::string_view kValue = ".value_weight";
  check_grafted(module, "fusion_regularization_loss");
  const std::vector<NamedComposition> compositions = read_compositions(module.attr("adapters").toModule());
  TORCH_CHECK(find_fused(compositions, name), "fusion_regularization_loss: no composition with a Fuse is called '",
              name, "'");
  at::Tensor loss = at::zeros({});
  for (const auto& [path, parameter] : parameters_of(module, name, "fusion_regularization_loss")) {
    if (path.ends_with(kValue)) {
      const at::Tensor unit = at::eye(parameter.size(0), parameter.options().requires_grad(false));
      loss = loss + kWeight * (unit - parameter).pow(2).sum();
    }
  }
  return loss;
}

Module freeze_adapter(const Module& module, const std::string& name) {
  return with_trainable(module, name, /*trainable=*/false, "freeze_adapter");
}

Module unfreeze_adapter(const Module& module, const std::string& name) {
  return with_trainable(module, name, /*trainable=*/true, "unfreeze_adapter");
}

}  // namespace torchgraft
