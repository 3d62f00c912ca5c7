#include <torchgraft/plan/match_modules.h>

#include <torchgraft/plan/locations.h>
#include <torchgraft/plan/saved_paths.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>

namespace torchgraft {
namespace {

using Path = SavedPath;

// The sites that the names in a saved module's path stand for.
std::vector<std::string> sites_by_name(const SavedModule& saved) {
  const bool cross = is_cross_attention(saved.path);
  switch (saved.kind) {
    case SavedKind::kLoRA:
      return lora_sites(saved.path);
    case SavedKind::kBottleneck:
      return {cross ? "cross_adapter" : mentions(saved.path, "attention") ? "mh_adapter" : "output_adapter"};
    case SavedKind::kPrefixGate:
      return cross ? std::vector<std::string>{"cross_prefix"}
                   : std::vector<std::string>{"self_prefix", "encoder_prefix"};
    case SavedKind::kReft:
      return {"output_reft"};
  }
  TORCH_INTERNAL_ASSERT(false, "unknown kind of saved module");
}

// A layer's projections by site, with their paths.
std::vector<std::pair<std::string, Path>> projection_paths(const Layer& layer) {
  std::vector<std::pair<std::string, Path>> result;
  for (const auto& [site, projection] :
       {std::pair("lora_q", &layer.query), std::pair("lora_k", &layer.key), std::pair("lora_v", &layer.value),
        std::pair("lora_o", &layer.output), std::pair("gate_lora", &layer.ffn_gate),
        std::pair("intermediate_lora", &layer.ffn_in), std::pair("output_lora", &layer.ffn_out)}) {
    if (*projection) {
      const bool in_attention = std::string_view(site).starts_with("lora_");
      const std::string prefix = layer.kind == AttentionKind::kCross ? "crossattn_" : "selfattn_";
      result.emplace_back((in_attention ? prefix : "") + site, split_path((*projection)->path));
    }
  }
  return result;
}

// The longest run of components, from saved[number] backwards, that `path` has too: its length, and the position of the
// number in `path`.
struct Overlap {
  size_t length = 0;
  size_t number = 0;
};

Overlap overlap(const Path& saved, size_t number, const Path& path) {
  Overlap best;
  for (size_t i = 0; i < path.size(); ++i) {
    size_t length = 0;
    while (length <= std::min(i, number) && path[i - length] == saved[number - length]) {
      ++length;
    }
    if (length > best.length) {
      best = {length, i};
    }
  }
  return best;
}

// By number alone the layers of two towers cannot be told apart.
void check_one_stack(const Structure& structure, const Path& path) {
  std::set<int64_t> encoders;
  std::set<int64_t> others;
  for (const Layer& layer : structure.layers) {
    (layer.kind == AttentionKind::kEncoder ? encoders : others).insert(layer.stack);
  }
  TORCH_CHECK(encoders.size() <= 1 && others.size() <= 1, "adapter weights: ", c10::Join(".", path),
              " is matched by the number of its layer, for the module has no such path (a frozen module has none), and "
              "the module has several stacks of layers, which all count from 0; graft the module before it is frozen, "
              "or a module whose paths are the adapter's");
}

// The positions of the layers with the number in `path`. Self and cross attention of one decoder layer share a number.
// In saved paths a decoder counts from 0 again, in the structure it counts on from the encoder.
std::vector<int64_t> layers_by_number(const Structure& structure, const Path& path) {
  const auto position = number_position(path);
  if (!position) {
    return {};
  }
  check_one_stack(structure, path);
  int64_t encoders = 0;
  for (const Layer& layer : structure.layers) {
    encoders = layer.kind == AttentionKind::kEncoder ? std::max(encoders, layer.number + 1) : encoders;
  }
  const Path container(path.begin(), path.begin() + *position);
  const int64_t wanted = std::stoll(path[*position]) + (mentions(container, "decoder") ? encoders : 0);
  std::vector<int64_t> result;
  for (size_t i = 0; i < structure.layers.size(); ++i) {
    if (structure.layers[i].number == wanted && !structure.layers[i].shares) {
      result.push_back(static_cast<int64_t>(i));
    }
  }
  return result;
}

// The sites by name that a saved module may have in this layer. A decoder layer has two attentions; its feed-forward
// block may be found behind either.
std::vector<std::string> sites_by_name(const SavedModule& saved, const Layer& layer) {
  if (saved.kind == SavedKind::kLoRA && layer.ffn_gate && is_unclear_beside_gate(saved.path)) {
    return {};
  }
  std::vector<std::string> named = sites_by_name(saved);
  const bool in_attention = !named.empty() && named.front().find("attn_lora") != std::string::npos;
  const bool layer_is_cross = layer.kind == AttentionKind::kCross;
  return !in_attention || is_cross_attention(saved.path) == layer_is_cross ? named : std::vector<std::string>();
}

class Matcher {
 public:
  Matcher(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure);

  std::vector<SavedParameters> match();

 private:
  // Positions in structure_.layers.
  std::vector<int64_t> layers_by_path(const Path& path) const;
  std::vector<std::string> sites_by_path(const Path& path, int64_t layer) const;
  std::vector<std::string> bottleneck_by_path(const Path& path, int64_t layer) const;
  std::vector<size_t> linear_maps_for(const SavedModule& saved) const;
  std::vector<size_t> projections_for(const SavedModule& saved) const;
  std::vector<size_t> modules_for(const SavedModule& saved) const;
  void assign(const SavedModule& saved, const std::vector<size_t>& modules);

  const Checkpoint& checkpoint_;
  const Plan& plan_;
  const Structure& structure_;
  bool paths_are_known_ = false;
  std::vector<SavedParameters> result_;
};

Matcher::Matcher(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure)
    : checkpoint_(checkpoint), plan_(plan), structure_(structure), result_(plan.size()) {
  paths_are_known_ = std::any_of(checkpoint.modules.begin(), checkpoint.modules.end(),
                                 [&](const SavedModule& saved) { return !layers_by_path(saved.path).empty(); });
}

// The layers whose paths overlap longest with `path`, at least in the container's name and the number.
std::vector<int64_t> Matcher::layers_by_path(const Path& path) const {
  const auto number = number_position(path);
  size_t longest = 2;
  std::vector<int64_t> result;
  for (size_t i = 0; number && i < structure_.layers.size(); ++i) {
    if (structure_.layers[i].shares) {
      continue;
    }
    size_t length = 0;
    for (const auto& [site, projection] : projection_paths(structure_.layers[i])) {
      length = std::max(length, overlap(path, *number, projection).length);
    }
    if (length > longest) {
      result.clear();
      longest = length;
    }
    if (length == longest) {
      result.push_back(static_cast<int64_t>(i));
    }
  }
  return result;
}

// The planned sites whose projection in `layer` has the very path of the saved LoRA. Where lists hold one projection of
// each layer ("queries.0", "values.0"), what stands before the number tells them apart.
std::vector<std::string> Matcher::sites_by_path(const Path& path, int64_t layer) const {
  const auto number = number_position(path);
  const auto is_planned = [&](const std::string& site) {
    return std::any_of(plan_.begin(), plan_.end(), [&](const PlannedModule& module) {
      return module.layer == structure_.layers.at(layer).index && module.site == site;
    });
  };
  size_t longest = 1;
  std::vector<std::string> result;
  for (const auto& [site, projection] : projection_paths(structure_.layers.at(layer))) {
    const Overlap found = overlap(path, *number, projection);
    if (found.length < longest || !is_planned(site) ||
        !std::equal(path.begin() + *number, path.end(), projection.begin() + found.number, projection.end())) {
      continue;
    }
    if (found.length > longest) {
      longest = found.length;
      result.clear();
    }
    result.push_back(site);
  }
  return result;
}

// The site of a bottleneck on a module that holds the layer's output projection (T5: "layer.1", which has
// EncDecAttention.o), or the end of its feed-forward block.
std::vector<std::string> Matcher::bottleneck_by_path(const Path& path, int64_t index) const {
  const Layer& layer = structure_.layers.at(index);
  const auto number = number_position(path);
  const auto holds = [&](const std::optional<Projection>& projection) {
    const Path inner = split_path(projection ? projection->path : "");
    const Overlap found = overlap(path, *number, inner);
    const auto rest = static_cast<size_t>(path.end() - path.begin()) - *number;
    return found.length > 0 && inner.size() > found.number + rest &&
           std::equal(path.begin() + *number, path.end(), inner.begin() + found.number);
  };
  const bool is_whole_layer = holds(layer.output) && holds(layer.ffn_out);
  if (is_whole_layer) {
    return {};
  }
  if (holds(layer.output)) {
    return {attention_adapter_location(layer)};
  }
  return holds(layer.ffn_out) ? std::vector<std::string>{"output_adapter"} : std::vector<std::string>{};
}

// The planned LoRAs outside of the layers whose linear map has the saved path, or ends with it.
std::vector<size_t> Matcher::linear_maps_for(const SavedModule& saved) const {
  std::vector<size_t> result;
  for (size_t i = 0; saved.kind == SavedKind::kLoRA && i < plan_.size(); ++i) {
    const auto position = linear_map_position(plan_[i].site);
    if (!position) {
      continue;
    }
    const Layer& layer = structure_.layers.at(structure_.position(plan_[i].layer));
    const Path path = split_path(layer.linear_maps.at(*position).path);
    if (path.size() >= saved.path.size() && std::equal(saved.path.rbegin(), saved.path.rend(), path.rbegin())) {
      result.push_back(i);
    }
  }
  return result;
}

// The planned LoRAs on the projections that have the very path of the saved LoRA. A packed projection has one path for
// queries, keys and values.
std::vector<size_t> Matcher::projections_for(const SavedModule& saved) const {
  std::vector<size_t> result;
  for (size_t i = 0; saved.kind == SavedKind::kLoRA && i < plan_.size(); ++i) {
    const auto paths = projection_paths(structure_.layers.at(structure_.position(plan_[i].layer)));
    if (std::any_of(paths.begin(), paths.end(),
                    [&](const auto& entry) { return entry.first == plan_[i].site && entry.second == saved.path; })) {
      result.push_back(i);
    }
  }
  return result;
}

// Whether the paths of all projections of a layer have a number: save_adapter_hub.cpp makes up the others.
bool has_numbers(const Layer& layer) {
  const auto paths = projection_paths(layer);
  return std::all_of(paths.begin(), paths.end(), [](const auto& entry) { return number_position(entry.second); });
}

// Whether a path may be one that save_adapter_hub.cpp makes up for a projection whose own path has no number.
bool is_of_writer(const Path& path) { return path.size() > 2 && path[0] == "layer" && is_number(path[1]); }

// The modules of the plan that a saved module is for.
std::vector<size_t> Matcher::modules_for(const SavedModule& saved) const {
  if (const auto linear = linear_maps_for(saved); !linear.empty()) {
    return linear;
  }
  if (const auto projections = projections_for(saved); !projections.empty()) {
    return projections;
  }
  std::vector<int64_t> layers = paths_are_known_ ? layers_by_path(saved.path) : std::vector<int64_t>();
  if (!paths_are_known_ || (layers.empty() && is_of_writer(saved.path))) {
    layers = layers_by_number(structure_, saved.path);
    std::erase_if(layers, [&](int64_t layer) { return paths_are_known_ && has_numbers(structure_.layers.at(layer)); });
  }
  std::map<int64_t, std::vector<std::string>> sites;
  if (paths_are_known_ && saved.kind == SavedKind::kLoRA) {
    for (const int64_t layer : layers) {
      if (auto exact = sites_by_path(saved.path, layer); !exact.empty()) {
        sites[structure_.layers.at(layer).index] = std::move(exact);
      }
    }
  }
  if (paths_are_known_ && saved.kind == SavedKind::kBottleneck) {
    for (const int64_t layer : layers) {
      if (auto exact = bottleneck_by_path(saved.path, layer); !exact.empty()) {
        sites[structure_.layers.at(layer).index] = std::move(exact);
      }
    }
  }
  if (sites.empty()) {
    for (const int64_t layer : layers) {
      sites[structure_.layers.at(layer).index] = sites_by_name(saved, structure_.layers.at(layer));
    }
  }
  std::vector<size_t> modules;
  for (size_t i = 0; i < plan_.size(); ++i) {
    const auto found = sites.find(plan_[i].layer);
    if (found != sites.end() &&
        std::find(found->second.begin(), found->second.end(), plan_[i].site) != found->second.end()) {
      modules.push_back(i);
    }
  }
  return modules;
}

std::string describe(const PlannedModule& module) { return module.site + " of layer " + std::to_string(module.number); }

// Gives each module its part: all of the saved module, or its share of a packed q, k, v.
void Matcher::assign(const SavedModule& saved, const std::vector<size_t>& modules) {
  const std::string& key = saved.parameters.begin()->second.key;
  const auto count = static_cast<int64_t>(modules.size());
  for (const size_t index : modules) {
    const PlannedModule& first = plan_[modules.front()];
    const bool packed = saved.kind == SavedKind::kLoRA && plan_[index].layer == first.layer;
    TORCH_CHECK(packed || index == modules.front(), "adapter weights: ", key, " could be for ", describe(first),
                " and for ", describe(plan_[index]), "; only packed projections of one layer share a saved module");
  }
  int64_t first_output = 0;  // of this part, among the outputs of all
  for (size_t part = 0; part < modules.size(); ++part) {
    const PlannedModule& module = plan_[modules[part]];
    const auto* lora = std::get_if<PlannedLoRA>(&module.method);
    const int64_t outputs = lora ? lora->out_features : 0;
    SavedParameters& target = result_[modules[part]];
    TORCH_CHECK(target.empty(), "adapter weights: ", key, " and ", target.begin()->second.key, " are both for ",
                describe(module));
    for (const auto& [name, parameter] : saved.parameters) {
      at::Tensor tensor = parameter.tensor;
      const bool is_by_output = name == "lora_b" || name == "bias" || name == "magnitude" || name == "fixed";
      if (count > 1 && is_by_output) {  // key and value heads may be fewer
        TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) >= first_output + outputs,
                    "adapter weights: expected the rows of ", parameter.key, " for the outputs of ", count,
                    " packed projections, got shape ", tensor.sizes());
        const bool is_last = part + 1 == modules.size();
        tensor = tensor.narrow(0, first_output, is_last ? tensor.size(0) - first_output : outputs);
      } else if (count > 1) {
        TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) % count == 0, "adapter weights: expected the rows of ",
                    parameter.key, " to be a multiple of ", count, " (a LoRA on ", count,
                    " packed projections), got shape ", tensor.sizes());
        const int64_t rows = tensor.size(0) / count;
        tensor = tensor.narrow(0, static_cast<int64_t>(part) * rows, rows);
      }
      target[name] = {parameter.key, tensor};
    }
    first_output += outputs;
  }
}

std::vector<SavedParameters> Matcher::match() {
  for (const SavedModule& saved : checkpoint_.modules) {
    const std::vector<size_t> modules = modules_for(saved);
    TORCH_CHECK(!modules.empty(), "adapter weights: the checkpoint has ", saved.parameters.begin()->second.key,
                ", for which the config and the model have no site (the model has ", structure_.layers.size(),
                " layers); check that model and config are those of the adapter");
    assign(saved, modules);
  }
  return std::move(result_);
}

}  // namespace

std::vector<SavedParameters> match_modules(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure) {
  return Matcher(checkpoint, plan, structure).match();
}

std::vector<std::pair<int64_t, std::string>> lora_sites_by_number(const Structure& structure, const std::string& path) {
  const SavedModule saved{SavedKind::kLoRA, split_path(path), {}};
  std::vector<std::pair<int64_t, std::string>> result;
  for (const int64_t position : layers_by_number(structure, saved.path)) {
    const Layer& layer = structure.layers.at(position);
    const auto present = projection_paths(layer);
    for (const std::string& site : sites_by_name(saved, layer)) {
      if (std::any_of(present.begin(), present.end(), [&](const auto& entry) { return entry.first == site; })) {
        result.emplace_back(position, site);
      }
    }
  }
  return result;
}

}  // namespace torchgraft
