#include <torchgraft/patch/fusion.h>

#include <torchgraft/patch/adapters/adapter_files.h>
#include <torchgraft/patch/adapters/directory_owner.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/patch/adapters/one_version.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/sites/attention_class.h>
#include <torchgraft/plan/regular_file.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/save_adapter_hub.h>
#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

namespace {

constexpr const char* kFusionConfigFile = "adapter_fusion_config.json";
constexpr const char* kFusionWeightsFile = "model_adapter_fusion.safetensors";
constexpr const char* kPickledFusionFile = "pytorch_model_adapter_fusion.bin";

std::vector<AdapterFusion>::iterator find_fusion(Draft& draft, const std::string& name, const char* what) {
  const auto found = std::find_if(draft.fusions.begin(), draft.fusions.end(),
                                  [&](const AdapterFusion& held) { return held.name() == name; });
  TORCH_CHECK(found != draft.fusions.end(), what, ": the module has no AdapterFusion layers '", name, "'");
  return found;
}

// The Fuse with layers of this name; none where there is none.
const Composition* find_fuse(const Composition& block, const std::string& name) {
  if (block.kind == BlockKind::kFuse && fusion_name(block) == name) {
    return &block;
  }
  for (const Composition& child : block.children) {
    if (const Composition* found = find_fuse(child, name)) {
      return found;
    }
  }
  return nullptr;
}

// What the layers weigh: the adapters of a composition that uses them, else those that their directory named.
std::vector<std::string> fused_adapters(const Draft& draft, const AdapterFusion& fusion) {
  for (const NamedComposition& composition : draft.compositions) {
    if (const Composition* fuse = find_fuse(composition.tree, fusion.name())) {
      std::vector<std::string> names;
      for (const Composition& child : fuse->children) {
        names.push_back(last_adapter(child));
      }
      return names;
    }
  }
  return fusion.config.adapters;
}

// In keys of weights the name stands between dots, and a setup has a directory of this name.
void check_fusion_name(const std::string& name, const char* what) {
  const bool has_any = std::any_of(name.begin(), name.end(), [](unsigned char c) { return c == '.' || c < ' '; });
  TORCH_CHECK(!name.empty() && !has_any && name.size() <= kLongestText, what, ": '", shown_text(name),
              "' cannot be the name of AdapterFusion layers: use a text of at most ", kLongestText,
              " bytes without dots and control characters");
}

// The sites where an adapter has bottlenecks, in any layer.
std::set<std::string> bottleneck_sites(const Adapter& adapter) {
  std::set<std::string> sites;
  for (const PlannedModule& module : adapter.plan) {
    if (std::holds_alternative<PlannedBottleneck>(module.method)) {
      sites.insert(module.site);
    }
  }
  return sites;
}

// Those of all adapters of a Fuse.
std::set<std::string> fused_sites(const Draft& draft, const std::vector<std::string>& adapters) {
  std::set<std::string> result;
  for (const std::string& name : adapters) {
    const Adapter& adapter = draft.adapters[find_plain(draft, name, "add_adapter_fusion")];
    const std::set<std::string> sites = bottleneck_sites(adapter);
    TORCH_CHECK(!sites.empty(), "add_adapter_fusion: '", name, "' has no bottlenecks, and a Fuse has no other method");
    if (name == adapters.front()) {
      result = sites;
    }
    TORCH_CHECK(sites == result, "add_adapter_fusion: '", adapters.front(), "' has bottlenecks at ",
                c10::Join(", ", result), ", and '", name, "' at ", c10::Join(", ", sites),
                "; the adapters library fuses adapters of the same locations only");
  }
  return result;
}

}  // namespace

Module add_adapter_fusion(const Module& module, const Composition& fuse, const FusionConfig& config, bool trainable) {
  TORCH_CHECK(fuse.kind == BlockKind::kFuse, "add_adapter_fusion: expected a Fuse, got ", composition_to_string(fuse));
  check_composition(fuse, "add_adapter_fusion");
  check_supported(config);
  Draft draft = open_grafted(module, "add_adapter_fusion");
  FusionConfig own = config;
  own.name = fusion_name(fuse);
  check_fusion_name(own.name, "add_adapter_fusion");
  for (const AdapterFusion& held : draft.fusions) {
    TORCH_CHECK(held.name() != own.name, "add_adapter_fusion: the module has AdapterFusion layers '", own.name,
                "' already; remove them first (remove_adapter_fusion), or give the Fuse another name");
  }
  own.adapters.clear();
  for (const Composition& child : fuse.children) {
    own.adapters.push_back(last_adapter(child));
  }
  if (trainable) {
    check_can_train(own, "add_adapter_fusion");
  }
  draft.fusions.push_back(fresh_fusion(own, fused_sites(draft, own.adapters), draft.sites.structure, draft.weights));
  draft.fusions.back().trainable = trainable;
  return build(std::move(draft), active_name(module));
}

Module load_adapter_fusion(const Module& module, const FusionConfig& config, const StateDict& weights,
                           const std::string& name) {
  check_fusion_name(config.name, "load_adapter_fusion");
  check_fusion_name(name.empty() ? config.name : name, "load_adapter_fusion");
  check_supported(config);
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

void check_replaces_fusion(const std::string& directory, const std::string& name) {
  static const OwnedFiles kFiles = {kFusionConfigFile,
                                    {kFusionWeightsFile, kPickledFusionFile},
                                    "the AdapterFusion layers",
                                    "AdapterFusion layers",
                                    "AdapterFusion layers"};
  const std::string wanted = kFiles.kind + " '" + name + "'";
  const std::string found = owner_of(directory, wanted, kFiles);
  TORCH_CHECK(found == wanted, "save_adapter_fusion: ", directory, " holds ", shown_text(found), " already, not '",
              shown_text(name), "'; give another directory, or overwrite=True to replace it");
}

void save_adapter_fusion(const Module& module, const std::string& name, const std::string& directory, bool overwrite) {
  Draft draft = open_grafted(module, "save_adapter_fusion");
  const AdapterFusion fusion = *find_fusion(draft, name, "save_adapter_fusion");
  const auto held = parse_json<nlohmann::ordered_json>(fusion_config_to_json(fusion.config), "adapter fusion");
  nlohmann::ordered_json file = {{"config", held.at("config")},
                                 {"hidden_size", draft.sites.structure.layers.front().hidden_size},
                                 {"model_class", nullptr},
                                 {"model_name", nullptr},
                                 {"model_type", nullptr},
                                 {"name", name},
                                 {"adapter_names", fused_adapters(draft, fusion)},
                                 {"version", "adapters.1.3.0"}};
  const StateDict weights = fusion_state(fusion, draft.sites.structure, attention_class(module, draft.sites.structure));
  DirectoryUpdate update(directory, kFusionConfigFile, [&] {
    if (!overwrite) {
      check_replaces_fusion(directory, name);
    }
  });
  update.stage(kFusionWeightsFile, [&](const std::string& path) { write_safetensors(weights, path); });
  update.stage(kFusionConfigFile, file.dump(2) + "\n");
  update.commit({kPickledFusionFile});
}

Module remove_adapter_fusion(const Module& module, const std::string& name) {
  Draft draft = open_grafted(module, "remove_adapter_fusion");
  const auto found = find_fusion(draft, name, "remove_adapter_fusion");
  for (const NamedComposition& composition : draft.compositions) {
    const std::vector<std::string> used = fusion_names(composition.tree);
    TORCH_CHECK(std::find(used.begin(), used.end(), name) == used.end(), "remove_adapter_fusion: the composition '",
                composition.name, "', ", composition_to_string(composition.tree), ", uses '", name,
                "'; remove it first");
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
