#include <torchgraft/patch/list_adapters.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/module/heads_module.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/reparametrisation.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

namespace {

void add_size(const at::Tensor& tensor, const std::string& location, AdapterInfo& info) {
  info.parameters += tensor.numel();
  info.bytes += static_cast<int64_t>(tensor.nbytes());
  info.by_location[location] += tensor.numel();
}

void add_head_size(const std::optional<Head>& head, AdapterInfo& info) {
  for (const auto& [name, tensor] : head ? head->weights : ModuleWeights()) {
    if (is_learned(head->config, name)) {
      add_size(tensor, "head", info);
    }
  }
}

// The AdapterFusion layers of a composition, each once, whatever other composition uses them, too.
void add_fusion_sizes(const Composition& composition, const std::vector<AdapterFusion>& fusions, AdapterInfo& info) {
  const std::vector<std::string> names = fusion_names(composition);
  for (const AdapterFusion& fusion : fusions) {
    if (std::find(names.begin(), names.end(), fusion.name()) == names.end()) {
      continue;
    }
    info.trainable |= fusion.trainable;
    for (const auto& [place, weights] : fusion.weights) {
      for (const auto& [name, tensor] : weights) {
        if (!is_unused(name)) {
          add_size(tensor, place.second, info);
        }
      }
    }
  }
}

// The location of a source of weights (a key of a Reparametrisation): "output_adapter" for "layer_0_output_adapter",
// "self_prefix" for a tower's prefixes.
std::string location_of(const std::string& source, const Plan& plan) {
  const auto module = std::find_if(plan.begin(), plan.end(), [&](const PlannedModule& planned) {
    const auto* prefix = std::get_if<PlannedPrefix>(&planned.method);
    return phm_place(planned, "", "", /*shared=*/false).source == source ||  // that of a LoRA's factors, too
           (prefix && prefix->pool == source);
  });
  return module == plan.end() ? source : module->location;
}

}  // namespace

std::vector<AdapterInfo> list_adapters(const Module& module) {
  check_grafted(module, "list_adapters");
  const std::string active = active_name(module);
  std::vector<AdapterInfo> result;
  const Module adapters_module = module.attr("adapters").toModule();
  std::vector<Adapter> adapters = read_adapters(adapters_module, inspect(module));
  read_heads(adapters_module, adapters);
  for (const Adapter& adapter : adapters) {
    AdapterInfo info;
    info.name = adapter.name;
    info.config = config_to_json(adapter.config);
    info.active = adapter.name == active;
    info.merged = adapter.merged;
    info.trainable = adapter.trainable;
    info.gate_pooling = has_gates(adapter.config) ? adapter.config.gate_pooling : "";
    for (size_t i = 0; i < adapter.plan.size(); ++i) {
      const PlannedModule& module = adapter.plan[i];
      const std::set<std::string> computed = computed_weights(adapter, module);
      for (const auto& [name, tensor] : adapter.weights[i]) {
        if (is_trained(name, module) && !computed.count(name)) {
          add_size(tensor, module.location, info);
        }
      }
    }
    for (const auto& [source, weights] : adapter.sources) {
      for (const auto& [name, tensor] : weights) {
        if (is_trained_source(name)) {
          add_size(tensor, location_of(source, adapter.plan), info);
        }
      }
    }
    add_head_size(adapter.head, info);
    result.push_back(std::move(info));
  }
  std::vector<NamedComposition> compositions = read_compositions(adapters_module);
  read_heads(adapters_module, adapters.size(), compositions);
  const std::vector<AdapterFusion> fusions = read_fusions(adapters_module);
  for (const NamedComposition& composition : compositions) {
    AdapterInfo info;
    add_fusion_sizes(composition.tree, fusions, info);
    add_head_size(composition.head, info);
    info.name = composition.name;
    info.config = composition_to_json(composition.tree);
    info.active = composition.name == active;
    info.composition = composition_to_string(composition.tree);
    result.push_back(std::move(info));
  }
  return result;
}

}  // namespace torchgraft
