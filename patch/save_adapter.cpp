#include <torchgraft/patch/save_adapter.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/config/library_differences.h>
#include <torchgraft/patch/adapters/adapter_files.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/directory_owner.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/heads_module.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/place_dtypes.h>
#include <torchgraft/patch/module/reads_back.h>
#include <torchgraft/patch/read_adapter.h>
#include <torchgraft/patch/sites/attention_class.h>
#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/head_weights.h>
#include <torchgraft/plan/library_layers.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/plan/save_adapter_hub.h>
#include <torchgraft/plan/saved_config.h>
#include <torchgraft/plan/saved_paths.h>
#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <map>
#include <set>
#include <sstream>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Module;
using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "adapters.1.3.0";

Json nullable(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

// The heads of keys and values of all prefixes, where they are as many in all layers.
std::optional<int64_t> prefix_heads(const Plan& plan) {
  std::set<int64_t> heads;
  for (const PlannedModule& module : plan) {
    if (const auto* prefix = std::get_if<PlannedPrefix>(&module.method)) {
      heads.insert(prefix->num_kv_heads);
    }
  }
  return heads.size() == 1 ? std::optional(*heads.begin()) : std::nullopt;
}

// The content of adapter_config.json or head_config.json around `config`.
Json config_file(const Json& config, const Structure& structure, const std::string& name,
                 const std::string& model_class, const std::string& model_type = "") {
  return {{"config", config},
          {"hidden_size", structure.layers.front().hidden_size},
          {"model_class", nullable(model_class)},
          {"model_name", nullptr},
          {"model_type", nullable(model_type)},
          {"name", name},
          {"version", kFormat}};
}

// Says of each ReFT without orthogonality whether it subtracts the projection, which the library's own files do not
// say: a NoReFT and a DiReFT look alike there.
void say_subtraction(Json& config) {
  if (config.contains("configs")) {
    for (Json& part : config.at("configs")) {
      say_subtraction(part);
    }
  } else if (config.contains("orthogonality") && config.at("orthogonality") == false) {
    config.emplace("subtract_projection", true);  // unless it is there
  }
}

void add_head_files(AdapterFiles& files, const std::optional<Head>& head, const Structure& structure,
                    const std::string& name, const std::string& model_class) {
  if (head) {
    const auto text = parse_json<Json>(head_config_to_json(head->config), "head");
    Json file = config_file(text.at("config"), structure, name, model_class);
    file["pooling"] = text.at("pooling");
    files.head_config = file.dump(2) + "\n";
    files.head_weights = head_state(head->config, head->weights, name);
  }
}

const OwnedFiles& owned_files() {
  static const OwnedFiles kFiles = {
      kConfigFile,
      {kWeightsFile, kPickledWeightsFile, kHeadConfigFile, kHeadWeightsFile, kPickledHeadFile},
      "the adapter",
      "an adapter",
      "an adapter of AdapterHub"};
  return kFiles;
}

// A fresh adapter is wired as defined, an adapter of the library as the library does it on this model.
void warn_of_wiring(const std::string& name, const AdapterConfig& config, const std::string& wired_for,
                    const std::string& attention) {
  const bool is_albert = attention.find("Albert") != std::string::npos;
  const char* model_type = is_albert ? "albert" : attention.find("GPTJ") != std::string::npos ? "gptj" : "";
  if (wired_for.empty() && !library_wiring(model_type, config).empty()) {
    TORCH_WARN("save_adapter: '", name, "' has bottlenecks which the adapters library wires otherwise on ",
               is_albert ? "ALBERT" : "GPT-J", ": it gives other results with this directory, torchgraft the same ",
               "(docs/adapters.md, \"What the library computes otherwise\")");
  }
}

// The library gives prefixes positions where scores have a term of relative positions, but on DeBERTa.
void warn_of_positions(const Adapter& adapter, const Structure& structure, const std::string& attention) {
  const bool is_t5 = attention.find("T5Attention") != std::string::npos;
  const bool is_deberta = attention.find("Deberta") != std::string::npos || attention.find("Disentangled") == 0;
  const bool moves = std::any_of(adapter.plan.begin(), adapter.plan.end(), [&](const PlannedModule& module) {
    const bool relative = structure.layers.at(structure.position(module.layer)).has_relative_scores && !is_deberta;
    return std::holds_alternative<PlannedPrefix>(module.method) && (is_t5 || relative);
  });
  if (moves) {
    TORCH_WARN("save_adapter: '", adapter.name,
               "' has prefixes, and the adapters library moves the relative positions ",
               "of this model's tokens by their length: it gives other results with this directory, torchgraft the ",
               "same (docs/adapters.md, \"What the library computes otherwise\")");
  }
}

// Layers of a whole CLIP that no result needs are not in `structure`, and the library counts them, too.
void check_towers(const Module& module, const Structure& structure) {
  std::map<SavedPath, std::set<std::string>> found;  // the numbers of its layers, by the path of a list
  for (const Layer& layer : structure.layers) {
    const SavedPath path = split_path(layer.query ? layer.query->path : "");
    if (const auto number = number_position(path)) {
      found[SavedPath(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(*number))].insert(path[*number]);
    }
  }
  for (const auto& [path, numbers] : found) {
    Module list = module;
    for (const std::string& name : path) {
      list = list.attr(name).toModule();
    }
    const size_t layers = list.named_children().size();
    TORCH_CHECK(layers == numbers.size(), "save_adapter: ", c10::Join(".", path), " has ", layers,
                " layers, and forward runs ", numbers.size(),
                ": the adapters library counts the others, too, so that the numbers of layers in the configuration ",
                "would be those of others there; keep the grafted file");
  }
}

// Those of the tower that runs first have the adapter here, in the library those of the texts.
void warn_of_embeddings(const Adapter& adapter, const Structure& structure) {
  const bool is_inverted = std::any_of(adapter.plan.begin(), adapter.plan.end(), [](const PlannedModule& module) {
    return std::holds_alternative<PlannedInvertible>(module.method);
  });
  if (is_inverted && is_whole_clip(structure)) {
    TORCH_WARN("save_adapter: '", adapter.name,
               "' has an invertible adapter, which the adapters library puts elsewhere in a whole CLIP, and counts ",
               "the layers in another order: it gives other results with this directory, torchgraft the same");
  }
}

}  // namespace

AdapterFiles adapter_files(const Module& module, const std::string& name, const std::string& model_class) {
  TORCH_CHECK(is_grafted(module), "save_adapter: the module has no adapters; graft some first");
  const Structure structure = inspect(module);
  const Module adapters_module = module.attr("adapters").toModule();
  std::vector<Adapter> adapters = read_adapters(adapters_module, structure);
  read_heads(adapters_module, adapters);
  for (const NamedComposition& composition : read_compositions(adapters_module)) {
    TORCH_CHECK(composition.name != name, "save_adapter: '", name, "' is a composition, ",
                composition_to_string(composition.tree), "; save_adapter_setup() in Python saves it with its adapters");
  }
  const Adapter& adapter = adapters[find_adapter(adapters, name, "save_adapter")];
  const AdapterConfig written = numbered_as_in_library(saved_config(adapter.config, adapter.sources), structure);
  if (written.wired_for != adapter.config.wired_for) {
    check_towers(module, structure);
  }
  AdapterConfig saved = written;
  const std::string model_type = std::exchange(saved.wired_for, "");
  const bool inverts_output = std::exchange(saved.inverts_output, true);
  const std::string pooling = std::exchange(saved.gate_pooling, kAllTokens);
  auto config = parse_json<Json>(config_to_json(saved), "config");
  say_subtraction(config);
  AdapterFiles files;
  Json file = config_file(config, structure, name, model_class, model_type);
  if (pooling != kAllTokens) {
    file["gate_pooling"] = pooling;  // the library reads over it
  }
  if (!inverts_output) {
    file[kInvertsOutput] = false;
  }
  if (const auto heads = prefix_heads(adapter.plan)) {
    file[kPrefixHeads] = *heads;
  }
  files.config = file.dump(2) + "\n";
  const std::string attention = attention_class(module, structure);
  warn_of_wiring(name, adapter.config, model_type, attention);
  warn_of_positions(adapter, structure, attention);
  warn_of_embeddings(adapter, structure);
  files.weights = adapter_hub_state(adapter.plan, structure, adapter.weights, adapter.sources, name, attention);
  check_reads_back(adapter, written, files.weights, structure, name);
  add_head_files(files, adapter.head, structure, name, model_class);
  return files;
}

AdapterFiles composition_head_files(const Module& module, const std::string& name, const std::string& model_class) {
  check_grafted(module, "save_adapter_setup");
  const Module adapters_module = module.attr("adapters").toModule();
  std::vector<NamedComposition> compositions = read_compositions(adapters_module);
  read_heads(adapters_module, adapter_names(adapters_module).size(), compositions);
  AdapterFiles files;
  const NamedComposition* composition = find_fused(compositions, name);
  if (composition && composition->head) {
    add_head_files(files, composition->head, inspect(module), name, model_class);
  }
  return files;
}

void check_replaces(const std::string& directory, const std::string& name) {
  TORCH_CHECK(!is_setup_directory(directory), "save_adapter: ", directory, " holds a composition (", kSetupFile,
              ") already; give another directory, or overwrite=True (torchgraft save --force) to replace it");
  const std::string wanted = "the adapter '" + name + "'";
  const std::string found = owner_of(directory, wanted, owned_files());
  TORCH_CHECK(found == wanted, "save_adapter: ", directory, " holds ", shown_text(found), " already, not '",
              shown_text(name), "'; give another directory, or overwrite=True (torchgraft save --force) to replace it");
}

void save_adapter(const Module& module, const std::string& name, const std::string& directory,
                  const std::string& model_class, bool overwrite) {
  const AdapterFiles files = adapter_files(module, name, model_class);
  DirectoryUpdate update(directory, kConfigFile, [&] {
    if (!overwrite) {
      check_replaces(directory, name);
    }
  });
  std::vector<std::string> obsolete = {kPickledWeightsFile, kPickledHeadFile};  // the library would read those
  update.stage(kWeightsFile, [&](const std::string& path) { write_safetensors(files.weights, path); });
  if (!files.head_config.empty()) {
    update.stage(kHeadWeightsFile, [&](const std::string& path) { write_safetensors(files.head_weights, path); });
    update.stage(kHeadConfigFile, files.head_config);
  } else {  // an earlier adapter may have left them
    obsolete.insert(obsolete.end(), {kHeadConfigFile, kHeadWeightsFile});
  }
  obsolete.push_back(kSetupFile);  // a composition, which check_replaces() lets nobody replace without asking
  update.stage(kConfigFile, files.config);
  update.commit(obsolete);
}

Module load_adapter(const Module& module, const AdapterSpec& spec) {
  if (!is_grafted(module)) {
    return graft(module, {spec});
  }
  const c10::IValue list = module.get_method("adapter_names")({});
  const auto names = list.toListRef();
  const bool known =
      std::any_of(names.begin(), names.end(), [&](const c10::IValue& name) { return name.toStringRef() == spec.name; });
  if (known) {
    return replace_adapter(module, spec);
  }
  Draft draft = open_draft(module, {});
  check_free_name(draft, spec.name);
  draft.adapters.push_back(make_placed_adapter(spec, draft.sites, draft.module, draft.weights));
  return build(std::move(draft), active_name(module));
}

Module load_adapter(const Module& module, const std::string& directory, const std::string& name) {
  return load_adapter(module, read_adapter_directory(directory, name));
}

std::vector<WeightMatch> match_adapter(const Module& module, const AdapterSpec& spec) {
  TORCH_CHECK(spec.weights, "match_adapter: '", spec.name, "' has no weights to match");
  const Structure structure = inspect(module);
  const Plan plan = make_plan(structure, spec.config);
  check_prefix_heads(spec, plan);
  adapter_hub_weights(plan, structure, *spec.weights, spec.name_in_weights(),
                      at::TensorOptions());  // throws where something does not fit
  return adapter_hub_matches(plan, structure, *spec.weights, spec.name_in_weights());
}

}  // namespace torchgraft
