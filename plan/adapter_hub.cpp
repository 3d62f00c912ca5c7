#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/prefix_mlp.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <optional>
#include <set>
#include <tuple>

namespace torchgraft {
namespace {

// A tensor of a checkpoint, with the key that it came under.
struct Saved {
  std::string key;
  at::Tensor tensor;
};
using SavedModule = std::map<std::string, Saved>;

// A checkpoint by place: (layer, slot) -> parameter -> tensor; prefix MLPs by location.
struct Checkpoint {
  std::map<std::pair<int64_t, std::string>, SavedModule> modules;
  std::map<std::string, SavedModule> prefixes;
};

std::vector<std::string> split(const std::string& path) {
  std::vector<std::string> parts = {""};
  for (const char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool is_one_of(const std::string& value, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), value) != names.end();
}

bool is_number(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

// The layer is the first number in a module path: "encoder.layer.3.output" -> 3.
std::optional<int64_t> layer_of(const std::vector<std::string>& path) {
  const auto found = std::find_if(path.begin(), path.end(), is_number);
  return found == path.end() || found->size() > 9 ? std::nullopt : std::optional<int64_t>(std::stoll(*found));
}

bool mentions(const std::vector<std::string>& path, const std::string& word) {
  return std::any_of(path.begin(), path.end(),
                     [&](const std::string& part) { return part.find(word) != std::string::npos; });
}

// The slot of a LoRA whose projection has this module path; empty when it is none that is known.
std::string lora_slot(const std::vector<std::string>& path) {
  const std::string& leaf = path.back();
  if (is_one_of(leaf, {"query", "q_proj", "q_lin", "q", "wq"})) {
    return "selfattn_lora_q";
  }
  if (is_one_of(leaf, {"key", "k_proj", "k_lin", "k", "wk"})) {
    return "selfattn_lora_k";
  }
  if (is_one_of(leaf, {"value", "v_proj", "v_lin", "v", "wv"})) {
    return "selfattn_lora_v";
  }
  if (mentions(path, "intermediate") || is_one_of(leaf, {"fc1", "lin1", "linear1", "wi", "up_proj", "c_fc"})) {
    return "intermediate_lora";
  }
  const bool ffn_output = mentions(path, "output") && !mentions(path, "attention");
  return ffn_output || is_one_of(leaf, {"fc2", "lin2", "linear2", "wo", "down_proj"}) ? "output_lora" : "";
}

std::string bottleneck_slot(const std::vector<std::string>& path) {
  if (mentions(path, "crossattention") || mentions(path, "cross_attention")) {
    return "cross_adapter";
  }
  return mentions(path, "attention") ? "mh_adapter" : "output_adapter";
}

// Our name of a parameter; empty when it is none that is known.
std::string parameter_name(const std::string& saved) {
  static const std::map<std::string, std::string> kNames = {
      {"lora_A", "lora_a"},
      {"lora_B", "lora_b"},
      {"adapter_down.0.weight", "down_weight"},
      {"adapter_down.0.bias", "down_bias"},
      {"adapter_up.weight", "up_weight"},
      {"adapter_up.bias", "up_bias"},
      {"scaling", "scaling"},
      {"gate.weight", "gate_weight"},
      {"gate.bias", "gate_bias"},
      {"weight", "gate_weight"},  // a prefix's gate is a Linear of its own
      {"bias", "gate_bias"},
      {"wte.weight", "embeddings"},
      {"control_trans.0.weight", "down_weight"},
      {"control_trans.0.bias", "down_bias"},
      {"control_trans.2.weight", "up_weight"},
      {"control_trans.2.bias", "up_bias"},
      {"control_trans", "flat"},
  };
  const auto found = kNames.find(saved);
  return found == kNames.end() ? "" : found->second;
}

std::string join(std::vector<std::string>::const_iterator first, std::vector<std::string>::const_iterator last) {
  std::string result;
  for (; first != last; ++first) {
    result += (result.empty() ? "" : ".") + *first;
  }
  return result;
}

// Sorts one key of the checkpoint in; false when it is not an adapter's weight.
bool sort_in(const std::string& key, const at::Tensor& tensor, const std::string& name, Checkpoint& checkpoint) {
  const std::vector<std::string> parts = split(key);
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    const std::string& group = parts[i - 1];
    if (parts[i] != name) {
      continue;
    }
    if (group == "prefix_tunings" && i + 2 < parts.size()) {
      // The pool hangs in every layer and at the root: all the same tensors.
      const std::string parameter = parameter_name(join(parts.begin() + i + 2, parts.end()));
      checkpoint.prefixes[parts[i + 1]].emplace(parameter, Saved{key, tensor});
      return !parameter.empty();
    }
    if (!is_one_of(group, {"loras", "adapters", "prefix_gates"})) {
      continue;
    }
    const std::vector<std::string> path(parts.begin(), parts.begin() + i - 1);
    const auto layer = layer_of(path);
    const std::string parameter = parameter_name(join(parts.begin() + i + 1, parts.end()));
    const std::string slot = path.empty()            ? ""
                             : group == "loras"      ? lora_slot(path)
                             : group == "adapters"   ? bottleneck_slot(path)
                             : mentions(path, "cross") ? "cross_prefix"
                                                     : "self_prefix";
    if (!layer || parameter.empty() || slot.empty()) {
      return false;
    }
    const auto [position, is_new] = checkpoint.modules[{*layer, slot}].emplace(parameter, Saved{key, tensor});
    TORCH_CHECK(is_new, "adapter weights: ", key, " and ", position->second.key, " are both for ", slot, " of layer ",
                *layer);
    return true;
  }
  return false;
}

std::string shape_of(at::IntArrayRef sizes) {
  return c10::str("[", c10::Join(", ", sizes), "]");
}

// Reads the weights of a plan out of a checkpoint, and remembers what was read.
class Reader {
 public:
  Reader(const Structure& structure, Checkpoint checkpoint, const at::TensorOptions& options)
      : structure_(structure), checkpoint_(std::move(checkpoint)), options_(options) {}

  ModuleWeights read(const PlannedModule& module);
  void check_nothing_is_left() const;

 private:
  at::Tensor take(const SavedModule& saved, const std::string& name, at::IntArrayRef shape, const std::string& place);
  void read_gate(const SavedModule& saved, int64_t gates, int64_t features, const std::string& place,
                 ModuleWeights& weights);
  at::Tensor ejected(const PlannedPrefix& prefix, const std::string& location);

  const Structure& structure_;
  Checkpoint checkpoint_;
  at::TensorOptions options_;
  std::map<std::string, at::Tensor> groups_;  // ejected prefixes by location
  std::set<std::string> used_;                // keys
};

at::Tensor Reader::take(const SavedModule& saved, const std::string& name, at::IntArrayRef shape,
                        const std::string& place) {
  const auto found = saved.find(name);
  TORCH_CHECK(found != saved.end(), "adapter weights: ", name, " of ", place, " is missing in the checkpoint");
  const at::Tensor& tensor = found->second.tensor;
  if (tensor.sizes() != shape) {
    const int64_t hidden = structure_.layers.front().hidden_size;
    const int64_t saved_hidden = tensor.dim() > 0 ? tensor.sizes().back() : 0;
    const bool other_hidden = tensor.dim() == 2 && !shape.empty() && shape.back() == hidden && saved_hidden != hidden;
    TORCH_CHECK(false, "adapter weights: expected ", found->second.key, " of shape ", shape_of(shape), ", got ",
                shape_of(tensor.sizes()),
                other_hidden ? c10::str("; this adapter was trained for hidden size ", saved_hidden,
                                        ", the model has ", hidden)
                             : std::string());
  }
  TORCH_CHECK(tensor.is_floating_point(), "adapter weights: expected ", found->second.key,
              " to be of a floating-point type, got ", tensor.scalar_type());
  used_.insert(found->second.key);
  return tensor.detach().to(options_);
}

void Reader::read_gate(const SavedModule& saved, int64_t gates, int64_t features, const std::string& place,
                       ModuleWeights& weights) {
  weights["gate_weight"] = take(saved, "gate_weight", {gates, features}, place);
  weights["gate_bias"] = take(saved, "gate_bias", {gates}, place);
}

at::Tensor Reader::ejected(const PlannedPrefix& prefix, const std::string& location) {
  if (const auto known = groups_.find(location); known != groups_.end()) {
    return known->second;
  }
  auto found = checkpoint_.prefixes.find(location);
  if (found == checkpoint_.prefixes.end()) {
    found = checkpoint_.prefixes.find(location.substr(0, location.find('_')));  // DistilBERT's "self"
  }
  TORCH_CHECK(found != checkpoint_.prefixes.end(), "adapter weights: the prefixes of ", location,
              " are missing in the checkpoint");
  const int64_t length = prefix.config.prefix_length;
  const int64_t out = prefix.group_size * 2 * prefix.num_kv_heads * prefix.head_dim;
  at::Tensor result;
  if (prefix.config.flat) {
    result = take(found->second, "flat", {length * out}, location).view({length, out});
  } else {
    const int64_t middle = prefix.config.bottleneck_size;
    PrefixMlp mlp;
    mlp.embeddings = take(found->second, "embeddings", {length, prefix.hidden_size}, location);
    mlp.down_weight = take(found->second, "down_weight", {middle, prefix.hidden_size}, location);
    mlp.down_bias = take(found->second, "down_bias", {middle}, location);
    mlp.up_weight = take(found->second, "up_weight", {out, middle}, location);
    mlp.up_bias = take(found->second, "up_bias", {out}, location);
    result = eject(mlp, prefix.config.non_linearity);
  }
  groups_[location] = result;
  return result;
}

ModuleWeights Reader::read(const PlannedModule& module) {
  const std::string place = module.slot + " of layer " + std::to_string(module.layer);
  const SavedModule& saved = checkpoint_.modules[{module.layer, module.slot}];
  ModuleWeights weights;
  if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    const LoRAConfig& config = lora->config;
    weights["lora_a"] = take(saved, "lora_a", {config.r, lora->in_features}, place);
    weights["lora_b"] = take(saved, "lora_b", {lora->out_features, config.r}, place);
    const double scaling = config.use_gating ? 1.0 : config.alpha / static_cast<double>(config.r);
    weights["scaling"] = at::full({}, scaling, options_);
    if (config.use_gating) {
      read_gate(saved, 1, lora->in_features, place, weights);
    }
  } else if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    const int64_t hidden = bottleneck->hidden_size;
    const int64_t size = bottleneck->bottleneck_size;
    weights["down_weight"] = take(saved, "down_weight", {size, hidden}, place);
    weights["down_bias"] = take(saved, "down_bias", {size}, place);
    weights["up_weight"] = take(saved, "up_weight", {hidden, size}, place);
    weights["up_bias"] = take(saved, "up_bias", {hidden}, place);
    if (const auto* number = std::get_if<double>(&bottleneck->config.scaling)) {
      weights["scaling"] = at::full({1}, *number, options_);
    } else {
      const bool per_channel = std::get<std::string>(bottleneck->config.scaling) == "channel";
      weights["scaling"] = take(saved, "scaling", {per_channel ? hidden : 1}, place);
    }
    if (bottleneck->config.use_gating) {
      read_gate(saved, 1, hidden, place, weights);
    }
  } else {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    std::tie(weights["prefix_key"], weights["prefix_value"]) =
        prefix_of_layer(ejected(prefix, module.location), prefix);
    if (prefix.config.use_gating) {
      const std::string slot = module.slot == "cross_prefix" ? "cross_prefix" : "self_prefix";
      read_gate(checkpoint_.modules[{module.layer, slot}], prefix.config.shared_gating ? 1 : 2, prefix.hidden_size,
                place, weights);
    }
  }
  return weights;
}

void Reader::check_nothing_is_left() const {
  for (const auto& [place, module] : checkpoint_.modules) {
    for (const auto& [name, saved] : module) {
      TORCH_CHECK(used_.count(saved.key), "adapter weights: the checkpoint has ", saved.key,
                  ", for which the config and the model have no place (the model has ", structure_.layers.size(),
                  " layers)");
    }
  }
  for (const auto& [location, mlp] : checkpoint_.prefixes) {
    for (const auto& [name, saved] : mlp) {
      TORCH_CHECK(used_.count(saved.key), "adapter weights: the checkpoint has ", saved.key,
                  ", for which the config and the model have no place");
    }
  }
}

}  // namespace

AdapterWeights adapter_hub_weights(const Plan& plan, const Structure& structure, const StateDict& state,
                                   const std::string& saved_name, const at::TensorOptions& options) {
  Checkpoint checkpoint;
  for (const auto& [key, tensor] : state) {
    TORCH_CHECK(sort_in(key, tensor, saved_name, checkpoint), "adapter weights: ", key,
                " is not a weight of an adapter '", saved_name, "' that is known");
  }
  Reader reader(structure, std::move(checkpoint), options);
  AdapterWeights result;
  for (const PlannedModule& module : plan) {
    result.push_back(reader.read(module));
  }
  reader.check_nothing_is_left();
  return result;
}

}  // namespace torchgraft
