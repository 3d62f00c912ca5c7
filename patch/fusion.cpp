#include <torchgraft/patch/fusion.h>

#include <torchgraft/patch/adapters/adapter_files.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/patch/adapters/one_version.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/plan/regular_file.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/save_adapter_hub.h>
#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

namespace {

constexpr const char* kFusionConfigFile = "adapter_fusion_config.json";
constexpr const char* kFusionWeightsFile = "model_adapter_fusion.safetensors";
constexpr const char* kPickledFusionFile = "pytorch_model_adapter_fusion.bin";

// Calls `visit` for each Fuse in a composition.
void for_each_fuse(const Composition& block, const std::function<void(const Composition&)>& visit) {
  if (block.kind == BlockKind::kFuse) {
    visit(block);
  }
  for (const Composition& child : block.children) {
    for_each_fuse(child, visit);
  }
}

std::vector<AdapterFusion>::iterator find_fusion(Draft& draft, const std::string& name, const char* what) {
  const auto found = std::find_if(draft.fusions.begin(), draft.fusions.end(),
                                  [&](const AdapterFusion& held) { return held.name() == name; });
  TORCH_CHECK(found != draft.fusions.end(), what, ": the module has no AdapterFusion layers '", name, "'");
  return found;
}

}  // namespace

Module load_adapter_fusion(const Module& module, const FusionConfig& config, const StateDict& weights,
                           const std::string& name) {
  TORCH_CHECK(!config.name.empty(), "load_adapter_fusion: the layers have no name");
  Draft draft = open_grafted(module, "load_adapter_fusion");
  AdapterFusion fusion = read_fusion(config, weights, draft.sites.structure, draft.weights);
  fusion.config.name = name.empty() ? config.name : name;
  std::erase_if(draft.fusions, [&](const AdapterFusion& held) { return held.name() == fusion.name(); });
  draft.fusions.push_back(std::move(fusion));
  return build(std::move(draft), active_name(module));
}

Module load_adapter_fusion(const Module& module, const std::string& directory, const std::string& name) {
  FusionConfig config;
  StateDict weights;
  read_one_version(directory, {kFusionConfigFile, kFusionWeightsFile}, kFusionConfigFile, [&] {
    config = fusion_config_from_json(read_text(directory + "/" + kFusionConfigFile, kLongestConfig));
    weights = read_safetensors(directory + "/" + kFusionWeightsFile);
  });
  return load_adapter_fusion(module, config, weights, name);
}

void save_adapter_fusion(const Module& module, const std::string& name, const std::string& directory) {
  Draft draft = open_grafted(module, "save_adapter_fusion");
  const AdapterFusion fusion = *find_fusion(draft, name, "save_adapter_fusion");
  const auto held = parse_json<nlohmann::ordered_json>(fusion_config_to_json(fusion.config), "adapter fusion");
  nlohmann::ordered_json file = {{"config", held.at("config")},
                                 {"hidden_size", draft.sites.structure.layers.front().hidden_size},
                                 {"model_class", nullptr},
                                 {"model_name", nullptr},
                                 {"model_type", nullptr},
                                 {"name", name},
                                 {"adapter_names", fusion.config.adapters},
                                 {"version", "adapters.1.3.0"}};
  const StateDict weights = fusion_state(fusion, draft.sites.structure);
  DirectoryUpdate update(directory, kFusionConfigFile);
  update.stage(kFusionWeightsFile, [&](const std::string& path) { write_safetensors(weights, path); });
  update.stage(kFusionConfigFile, file.dump(2) + "\n");
  update.commit({kPickledFusionFile});
}

Module remove_adapter_fusion(const Module& module, const std::string& name) {
  Draft draft = open_grafted(module, "remove_adapter_fusion");
  const auto found = find_fusion(draft, name, "remove_adapter_fusion");
  for (const NamedComposition& composition : draft.compositions) {
    for_each_fuse(composition.tree, [&](const Composition& fuse) {
      TORCH_CHECK(fusion_name(fuse) != name, "remove_adapter_fusion: the composition '", composition.name, "', ",
                  composition_to_string(composition.tree), ", uses '", name, "'; remove it first");
    });
  }
  draft.fusions.erase(found);
  return build(std::move(draft), active_name(module));
}

std::vector<FusionConfig> list_adapter_fusions(const Module& module) {
  check_grafted(module, "list_adapter_fusions");
  std::vector<FusionConfig> result;
  for (const AdapterFusion& fusion : read_fusions(module.attr("adapters").toModule())) {
    result.push_back(fusion.config);
  }
  return result;
}

}  // namespace torchgraft
