#include <torchgraft/plan/library_layers.h>

#include <torchgraft/config/library_differences.h>
#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/locations.h>
#include <torchgraft/plan/saved_paths.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

namespace torchgraft {
namespace {

constexpr const char* kClip = "clip";

enum class Tower { kNone, kText, kVision };

SavedPath path_of(const Layer& layer) {
  const auto& first = layer.query ? layer.query : layer.key ? layer.key : layer.value;
  return first ? split_path(first->path) : SavedPath();
}

// The tower of a CLIP: "<...>.text_model.encoder.layers.<number>.self_attn.<...>", or "vision_model".
Tower tower_of(const SavedPath& path) {
  const auto number = number_position(path);
  const bool is_clip = number && *number >= 3 && *number + 1 < path.size() && path[*number - 1] == "layers" &&
                       path[*number - 2] == "encoder" && path[*number + 1] == "self_attn";
  const std::string name = is_clip ? path[*number - 3] : "";
  return name == "text_model" ? Tower::kText : name == "vision_model" ? Tower::kVision : Tower::kNone;
}

// The numbers of a whole CLIP's layers as found, in the library's order; empty for any other structure.
std::vector<int64_t> library_order(const Structure& structure) {
  std::map<Tower, std::vector<int64_t>> towers;
  for (const Layer& layer : structure.layers) {
    if (layer.shares) {
      continue;
    }
    const SavedPath path = path_of(layer);
    const auto number = number_position(path);
    std::vector<int64_t>& tower = towers[tower_of(path)];
    if (layer.kind != AttentionKind::kSelf || !number || path[*number] != std::to_string(tower.size())) {
      return {};
    }
    tower.push_back(layer.number);
  }
  if (towers.count(Tower::kNone) || towers.size() < 2) {
    return {};
  }
  std::vector<int64_t> order = towers[Tower::kText];
  order.insert(order.end(), towers[Tower::kVision].begin(), towers[Tower::kVision].end());
  const std::set<int64_t> all(order.begin(), order.end());
  const bool is_each_once = all.size() == order.size() && *all.begin() == 0 && *all.rbegin() + 1 == structure.depth();
  return is_each_once ? order : std::vector<int64_t>();
}

// What becomes of the number of a layer; nullopt where there is no such layer.
using Renumber = std::function<std::optional<int64_t>(int64_t)>;

// Drops the numbers of layers that are not there.
void renumber(std::vector<int64_t>& layers, const Renumber& renamed) {
  std::vector<int64_t> result;
  for (const int64_t layer : layers) {
    if (const auto number = renamed(layer)) {
      result.push_back(*number);
    }
  }
  layers = std::move(result);
}

void renumber(BnConfig& config, const Renumber& renamed) {
  renumber(config.leave_out, renamed);
  auto* factors = std::get_if<std::map<std::string, double>>(&config.reduction_factor);
  if (!factors) {
    return;
  }
  std::map<std::string, double> result;
  for (const auto& [key, factor] : *factors) {
    const auto number = is_number(key) ? renamed(std::stoll(key)) : std::nullopt;
    if (number || key == "default") {
      result[number ? std::to_string(*number) : key] = factor;
    }
  }
  *factors = std::move(result);
}

void renumber(PrefixTuningConfig& config, const Renumber& renamed) { renumber(config.leave_out, renamed); }

void renumber(LoRAConfig& config, const Renumber& renamed) { renumber(config.leave_out, renamed); }

void renumber(ReftConfig& config, const Renumber& renamed) {
  if (auto* layers = std::get_if<std::vector<int64_t>>(&config.layers)) {
    renumber(*layers, renamed);
  }
}

void renumber(PromptTuningConfig& /*config*/, const Renumber& /*renamed*/) {}

void renumber(AdapterConfig& config, const Renumber& renamed) {
  for (MethodConfig& method : config.methods) {
    std::visit([&](auto& held) { renumber(held, renamed); }, method);
  }
}

}  // namespace

bool is_whole_clip(const Structure& structure) { return !library_order(structure).empty(); }

std::string prefix_pool(const Structure& structure, const Layer& layer) {
  if (!is_whole_clip(structure)) {
    return prefix_location(layer);
  }
  return tower_of(path_of(layer)) == Tower::kText ? "clip_text_model_self_prefix" : "clip_vision_model_self_prefix";
}

AdapterConfig numbered_as_found(AdapterConfig config, const Structure& structure) {
  if (config.wired_for != kClip) {
    return config;
  }
  const std::vector<int64_t> order = library_order(structure);
  TORCH_CHECK(
      !order.empty(),
      "plan: the adapter is of a whole CLIP, of which the adapters library numbers the layers of the text tower "
      "first and keeps the prefixes of each tower apart, and the module's paths do not show two towers "
      "(\"text_model.encoder.layers.0\", \"vision_model.encoder.layers.0\"): a frozen module has no paths, and "
      "a tower alone has other numbers; graft the whole model before it is frozen, or, without prefixes, write "
      "the numbers that torchgraft.inspect() shows into its adapter_config.json and remove \"model_type\" there");
  renumber(config, [&](int64_t number) {
    TORCH_CHECK(number >= 0 && number < structure.depth(), "plan: the adapter's configuration names layer ", number,
                ", and this CLIP has layers 0 to ", structure.depth() - 1,
                " (the text's are first); check that the model is that of the adapter, or take the number out of the "
                "configuration");
    return std::optional(order[static_cast<size_t>(number)]);
  });
  config.wired_for.clear();
  return config;
}

AdapterConfig numbered_as_in_library(AdapterConfig config, const Structure& structure) {
  const std::vector<int64_t> order = library_order(structure);
  const bool has_inverse = std::any_of(config.methods.begin(), config.methods.end(), [](const MethodConfig& method) {
    const auto* bottleneck = std::get_if<BnConfig>(&method);
    return bottleneck && bottleneck->inv_adapter;
  });
  if (order.empty() || !config.wired_for.empty() || library_wiring(kClip, config).empty() || has_inverse) {
    return config;
  }
  renumber(config, [&](int64_t number) {
    const auto found = std::find(order.begin(), order.end(), number);
    return found == order.end() ? std::nullopt : std::optional<int64_t>(found - order.begin());
  });
  config.wired_for = kClip;
  return config;
}

}  // namespace torchgraft
