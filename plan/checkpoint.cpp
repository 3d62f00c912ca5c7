#include <torchgraft/plan/checkpoint.h>

#include <torchgraft/plan/reft_weights.h>
#include <torchgraft/registration/parse_json.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cctype>
#include <optional>
#include <set>

namespace torchgraft {
namespace {

using Path = std::vector<std::string>;

constexpr size_t kLongestNumber = 9;  // digits

std::string join(Path::const_iterator first, Path::const_iterator last) {
  std::string result;
  for (; first != last; ++first) {
    result += (result.empty() ? "" : ".") + *first;
  }
  return result;
}

const std::string kShared = "shared_parameters";
const std::string kInvertible = "invertible_adapters";
const std::string kPrompts = "prompt_tunings";
const std::string kBehindNorm = "down_behind_norm_";

bool is_phm_factor(const std::string& name) {
  static const std::set<std::string> kFactors = {"W",        "W_left",        "W_right",
                                                 "phm_rule", "phm_rule_left", "phm_rule_right"};
  return kFactors.count(name) > 0;
}

// Our name of a saved parameter; empty when we know none.
std::string parameter_name(const std::string& saved) {
  static const std::map<std::string, std::string> kNames = {
      {"lora_A", "lora_a"},
      {"lora_B", "lora_b"},
      {"lora_bias", "bias"},  // PEFT's, which peft.py passes in this name
      {"m.weight", "magnitude"},
      {"vera_D", "vera_d"},
      {"vera_B", "vera_b"},
      {"task_specific.values", "task_values"},
      {"weights", "task_weights"},
      {"fixed", "fixed"},  // only in PEFT's DoRA, which peft.py passes in these names
      {"adapter_down.0.weight", "down_weight"},
      {"adapter_down.0.bias", "down_bias"},
      {"adapter_down.1.weight", kBehindNorm + "weight"},  // then adapter_down.0 is the layer norm
      {"adapter_down.1.bias", kBehindNorm + "bias"},
      {"adapter_norm_before.weight", "norm_before_weight"},
      {"adapter_norm_before.bias", "norm_before_bias"},
      {"adapter_norm_after.weight", "norm_after_weight"},
      {"adapter_norm_after.bias", "norm_after_bias"},
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
  if (const auto found = kNames.find(saved); found != kNames.end()) {
    return found->second;
  }
  // Factors of Compacter's projections.
  for (const auto& [container, side] :
       {std::pair("adapter_down.0.", std::string("down_")), std::pair("adapter_down.1.", kBehindNorm),
        std::pair("adapter_up.", std::string("up_"))}) {
    if (saved.starts_with(container)) {
      const std::string factor = saved.substr(std::string_view(container).size());
      return factor == "b" ? side + "bias" : is_phm_factor(factor) ? side + factor : "";
    }
  }
  return reft_parameter_name(saved);
}

std::optional<SavedKind> kind_of(const std::string& container) {
  static const std::map<std::string, SavedKind> kKinds = {{"loras", SavedKind::kLoRA},
                                                          {"adapters", SavedKind::kBottleneck},
                                                          {"prefix_gates", SavedKind::kPrefixGate},
                                                          {"refts", SavedKind::kReft}};
  const auto found = kKinds.find(container);
  return found == kKinds.end() ? std::nullopt : std::optional(found->second);
}

// A key "<path>.<container>.<name>.<parameter>". The container is one of loras, adapters, prefix_gates, refts,
// prefix_tunings, prompt_tunings, invertible_adapters or shared_parameters (the last two without a path in a model that
// has no head).
struct ParsedKey {
  Path path;
  std::string container;
  std::string name;
  Path parameter;
};

std::optional<ParsedKey> parse(const std::string& key) {
  const Path parts = split_path(key);
  for (size_t i = 0; i + 2 < parts.size(); ++i) {
    if (kind_of(parts[i]) || parts[i] == "prefix_tunings" || parts[i] == kShared || parts[i] == kInvertible ||
        parts[i] == kPrompts) {
      return ParsedKey{Path(parts.begin(), parts.begin() + i), parts[i], parts[i + 1],
                       Path(parts.begin() + i + 2, parts.end())};
    }
  }
  return std::nullopt;
}

bool is_same(const at::Tensor& a, const at::Tensor& b) {
  const bool alike = a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type();
  return alike && (a.data_ptr() == b.data_ptr() || at::equal(a, b));
}

// The names of the adapters in the checkpoint, for an error message.
std::string names_in(const StateDict& state) {
  std::set<std::string> names;
  for (const auto& [key, tensor] : state) {
    if (const auto parsed = parse(key)) {
      names.insert(parsed->name);
    }
  }
  return shown_text(c10::Join(", ", names));
}

// With ln_before the library's down projection is a sequence of layer norm and linear map, and the norm has a second
// name.
void name_down_projection(SavedParameters& parameters) {
  std::vector<std::string> behind_norm;
  for (const auto& [parameter, saved] : parameters) {
    if (parameter.starts_with(kBehindNorm)) {
      behind_norm.push_back(parameter.substr(kBehindNorm.size()));
    }
  }
  if (behind_norm.empty()) {
    return;
  }
  for (const char* which : {"weight", "bias"}) {
    const auto first = parameters.find(std::string("down_") + which);
    if (first != parameters.end()) {
      const SavedTensor again = first->second;
      parameters.erase(first);
      const auto [norm, is_new] = parameters.emplace(std::string("norm_before_") + which, again);
      TORCH_CHECK(is_new || is_same(norm->second.tensor, again.tensor), "adapter weights: expected ", again.key,
                  " and ", norm->second.key, " to be the same layer norm, but their values differ");
    }
  }
  for (const std::string& which : behind_norm) {
    parameters["down_" + which] = parameters.at(kBehindNorm + which);
    parameters.erase(kBehindNorm + which);
  }
}

// Whether encoder and decoder have a pool of prefixes each, both with a "self_prefix" (an EncoderDecoderModel). A model
// that the library knows as one has one pool, which all its layers hold.
bool has_two_pools(const StateDict& state) {
  std::map<std::string, std::map<std::string, at::Tensor>> pools;  // by the path's first component
  for (const auto& [key, tensor] : state) {
    const auto parsed = parse(key);
    if (parsed && parsed->container == "prefix_tunings" && !parsed->path.empty() && !parsed->parameter.empty() &&
        parsed->parameter.front() == "self_prefix") {
      pools[parsed->path.front()].emplace(join(parsed->parameter.begin(), parsed->parameter.end()), tensor);
    }
  }
  const auto& encoder = pools["encoder"];
  return std::any_of(encoder.begin(), encoder.end(), [&](const auto& entry) {
    const auto found = pools["decoder"].find(entry.first);
    return found != pools["decoder"].end() && !is_same(found->second, entry.second);
  });
}

}  // namespace

std::vector<std::string> split_path(const std::string& path) {
  Path parts = {""};
  for (const char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool is_number(const std::string& component) {
  return !component.empty() && component.size() <= kLongestNumber &&
         std::all_of(component.begin(), component.end(), [](unsigned char c) { return std::isdigit(c); });
}

Checkpoint sort_checkpoint(const StateDict& state, const std::string& name) {
  Checkpoint checkpoint;
  std::map<std::string, size_t> modules;  // path and container -> index
  const bool two_pools = has_two_pools(state);
  for (const auto& [key, tensor] : state) {
    check_text(key, "adapter weights");
    const auto parsed = parse(key);
    if (parsed && parsed->name == name && parsed->container == kShared) {
      checkpoint.shared[join(parsed->parameter.begin(), parsed->parameter.end())] = {key, tensor};
      continue;
    }
    if (parsed && parsed->name == name && parsed->container == kInvertible) {
      const auto [kept, is_new] = checkpoint.invertible.emplace(
          join(parsed->parameter.begin(), parsed->parameter.end()), SavedTensor{key, tensor});
      TORCH_CHECK(is_new || is_same(tensor, kept->second.tensor), "adapter weights: expected ", key, " and ",
                  kept->second.key, " to be the same invertible adapter, but their values differ");
      continue;
    }
    if (parsed && parsed->name == name && parsed->container == kPrompts) {
      const auto [kept, is_new] =
          checkpoint.prompt.emplace(join(parsed->parameter.begin(), parsed->parameter.end()), SavedTensor{key, tensor});
      TORCH_CHECK(is_new || is_same(tensor, kept->second.tensor), "adapter weights: expected ", key, " and ",
                  kept->second.key, " to be the same prompt, but their values differ");
      continue;
    }
    const bool in_pool = parsed && parsed->container == "prefix_tunings";
    const size_t skipped = in_pool ? 1 : 0;  // the location comes before the parameter
    const std::string parameter =
        parsed ? parameter_name(join(parsed->parameter.begin() + skipped, parsed->parameter.end())) : "";
    const bool is_ours = parsed && parsed->name == name && !parameter.empty();
    TORCH_CHECK(is_ours, "adapter weights: ", key, " is not a weight of an adapter '", name,
                "' that is known; the checkpoint holds the adapters: ", names_in(state));
    if (in_pool) {
      // Every layer and the root hold the pool, with the same tensors.
      const std::string& saved_location = parsed->parameter.front();
      const bool is_encoders = two_pools && saved_location == "self_prefix" && parsed->path.front() == "encoder";
      const auto [kept, is_new] = checkpoint.prefixes[is_encoders ? "encoder_prefix" : saved_location].emplace(
          parameter, SavedTensor{key, tensor});
      TORCH_CHECK(is_new || is_same(tensor, kept->second.tensor), "adapter weights: expected ", key, " and ",
                  kept->second.key, " to be the same prefix, but their values differ");
      continue;
    }
    const std::string place = join(parsed->path.begin(), parsed->path.end()) + "." + parsed->container;
    const auto [index, is_new] = modules.emplace(place, checkpoint.modules.size());
    if (is_new) {
      checkpoint.modules.push_back({*kind_of(parsed->container), parsed->path, {}});
    }
    checkpoint.modules[index->second].parameters[parameter] = {key, tensor};
  }
  for (SavedModule& module : checkpoint.modules) {
    name_down_projection(module.parameters);
  }
  return checkpoint;
}

}  // namespace torchgraft
