#include <torchgraft/patch/adapter_bank.h>

#include <torchgraft/plan/prefix_mlp.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <set>
#include <tuple>

namespace torchgraft {
namespace {

// Execution order of the places in a layer.
int order_of(const std::string& slot) {
  static const std::vector<std::string> kOrder = {
      "selfattn_lora_q",  "selfattn_lora_k",   "selfattn_lora_v", "crossattn_lora_q", "crossattn_lora_k",
      "crossattn_lora_v", "self_prefix",       "encoder_prefix",  "cross_prefix",     "mh_adapter",
      "cross_adapter",    "intermediate_lora", "output_lora",     "output_adapter"};
  const auto found = std::find(kOrder.begin(), kOrder.end(), slot);
  TORCH_INTERNAL_ASSERT(found != kOrder.end(), "no execution order for ", slot);
  return static_cast<int>(found - kOrder.begin());
}

// Dropout changes the graph around an op, and acts in training only. Prefixes have theirs in front of the bank.
double dropout_at(const Adapter& adapter, const PlannedModule& module) {
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    return adapter.trainable ? bottleneck->config.dropout : 0.0;
  }
  const auto* lora = std::get_if<PlannedLoRA>(&module.method);
  return adapter.trainable && lora ? lora->config.dropout : 0.0;
}

std::string slot_name(const Adapter& adapter, const PlannedModule& module) {
  const std::string name = slot_name(module);
  return dropout_at(adapter, module) > 0.0 ? name + "_dropout_" + adapter.name : name;
}

}  // namespace

std::string slot_name(const PlannedModule& module) {
  std::string result = module.slot;
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    result += "_" + to_string(bottleneck_form(bottleneck->config));
  } else if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    const LoRAForm form = lora_form(lora->config);
    result += form == LoRAForm::kScale ? "_scale" : form == LoRAForm::kDora ? "_dora" : "";
  }
  return result;
}

bool broadcasts(const std::string& parameter, int64_t dim) {
  return (parameter.starts_with("gate_") && dim == 0) || parameter == "scaling";
}

double missing_value(const std::string& parameter) {
  return parameter == "gate_bias" ? std::numeric_limits<double>::infinity() : 0.0;
}

void write_parameter(at::Tensor row, const std::string& parameter, const at::Tensor& value) {
  for (int64_t i = 0; i < row.dim(); ++i) {
    if (!broadcasts(parameter, i)) {
      row = row.narrow(i, 0, value.size(i));
    }
  }
  row.copy_(value.detach());
}

namespace {

// Members of one bank: (adapter, index into its plan).
using Members = std::vector<std::pair<size_t, size_t>>;

// Stacks one parameter of the members into [N, ...], padding every dimension to the largest.
at::Tensor stack_parameter(const std::vector<Adapter>& adapters, const Members& members, const std::string& name) {
  std::vector<int64_t> sizes;
  at::Tensor example;
  for (const auto& [adapter, module] : members) {
    const ModuleWeights& weights = adapters[adapter].weights[module];
    const auto found = weights.find(name);
    if (found == weights.end()) {
      continue;
    }
    example = found->second;
    sizes.resize(std::max<size_t>(sizes.size(), example.dim()), 1);
    for (int64_t i = 0; i < example.dim(); ++i) {
      sizes[i] = std::max(sizes[i], example.size(i));
    }
  }
  sizes.insert(sizes.begin(), static_cast<int64_t>(adapters.size()));
  at::Tensor bank = at::zeros(sizes, example.options().requires_grad(false));
  for (const auto& [adapter, module] : members) {
    const at::Tensor row = bank[adapter];
    const ModuleWeights& weights = adapters[adapter].weights[module];
    const auto found = weights.find(name);
    if (found == weights.end()) {
      row.fill_(missing_value(name));
      continue;
    }
    write_parameter(row, name, found->second);
  }
  return bank;
}

// What is trained of a trainable member.
OwnWeights own_weights(const Adapter& adapter, size_t index, const PlannedModule& module, const ModuleWeights& weights,
                       bool scaling_is_trained) {
  OwnWeights own{index, adapter.name, module};
  own.from_mlp = adapter.sources.count(module.location) > 0;
  for (const auto& [name, tensor] : weights) {
    const bool computed = own.from_mlp && name.starts_with("prefix_");
    if (is_trained(name, scaling_is_trained) && !computed) {
      own.parameters[name] = tensor.detach().clone();
    }
  }
  return own;
}

// bool [N]: which adapters are members.
at::Tensor present_in(const Members& members, int64_t adapters) {
  at::Tensor result = at::zeros({adapters}, at::kBool);
  for (const auto& [adapter, module] : members) {
    result[static_cast<int64_t>(adapter)] = true;
  }
  return result;
}

BankSlot stack_slot(const std::vector<Adapter>& adapters, const Members& members) {
  at::NoGradGuard no_grad;
  const PlannedModule& first = adapters[members[0].first].plan[members[0].second];
  const Adapter& adapter = adapters[members[0].first];
  BankSlot slot{first.layer, first.number, first.location, first.slot, slot_name(adapter, first)};
  slot.dropout = dropout_at(adapter, first);
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&first.method)) {
    slot.form = bottleneck_form(bottleneck->config);
  } else if (const auto* lora = std::get_if<PlannedLoRA>(&first.method)) {
    slot.lora = lora_form(lora->config);
  }
  slot.gates.assign(adapters.size(), 0);
  std::set<std::string> names;
  for (const auto& [adapter, module] : members) {
    const ModuleWeights& weights = adapters[adapter].weights[module];
    for (const auto& [name, tensor] : weights) {
      names.insert(name);
    }
    if (const auto gate = weights.find("gate_bias"); gate != weights.end()) {
      slot.gates[adapter] = gate->second.size(0);
    }
  }
  for (const std::string& name : names) {
    slot.parameters[name] = stack_parameter(adapters, members, name);
  }
  if (!slot.form.is_plain() || slot.lora != LoRAForm::kAdd) {
    slot.parameters["present"] =
        present_in(members, static_cast<int64_t>(adapters.size())).to(slot.parameters.begin()->second.device());
  }
  if (std::holds_alternative<PlannedPrefix>(first.method)) {
    std::vector<int64_t> lengths(adapters.size(), 0);
    for (const auto& [adapter, module] : members) {
      lengths[adapter] = adapters[adapter].weights[module].at("prefix_key").size(1);
    }
    const auto device = slot.parameters.at("prefix_key").device();
    slot.parameters["prefix_length"] = at::tensor(lengths, at::kLong).to(device);
  }
  for (const auto& [a, m] : members) {
    if (adapters[a].trainable) {
      slot.own.push_back(own_weights(adapters[a], a, adapters[a].plan[m], adapters[a].weights[m],
                                     slot.form.scaling_is_trained));
      for (const auto& [name, tensor] : slot.own.back().parameters) {
        slot.parameters.at(name)[static_cast<int64_t>(a)].zero_();  // nobody reads it
      }
    }
  }
  return slot;
}

}  // namespace

std::string own_module_name(const std::string& adapter) { return "adapter_" + adapter; }

size_t find_adapter(const std::vector<Adapter>& adapters, const std::string& name, const char* what) {
  std::string names;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i].name == name) {
      return i;
    }
    names += (i == 0 ? "" : ", ") + adapters[i].name;
  }
  TORCH_CHECK(false, what, ": no adapter is called '", name, "'; there are: ", names);
}

bool BankSlot::has_bank(const std::string& parameter) const {
  return own.empty() || gates.size() > 1 || !is_trained(parameter, form.scaling_is_trained);
}

bool is_trained(const std::string& parameter, bool scaling_is_trained) {
  static const std::set<std::string> kFixed = {"prefix_length", "present", "weight_norm", "fixed"};
  return !kFixed.count(parameter) && (parameter != "scaling" || scaling_is_trained);
}

std::vector<BankSlot> stack_banks(const std::vector<Adapter>& adapters) {
  std::map<std::tuple<int64_t, int, std::string>, Members> groups;
  for (size_t a = 0; a < adapters.size(); ++a) {
    for (size_t m = 0; m < adapters[a].plan.size(); ++m) {
      const PlannedModule& module = adapters[a].plan[m];
      groups[{module.layer, order_of(module.slot), slot_name(adapters[a], module)}].emplace_back(a, m);
    }
  }
  std::vector<BankSlot> slots;
  for (const auto& [key, members] : groups) {
    slots.push_back(stack_slot(adapters, members));
  }
  return slots;
}

std::vector<SlotRun> slot_runs(const std::vector<BankSlot>& slots, const Structure& structure) {
  std::vector<SlotRun> runs;
  for (size_t i = 0; i < structure.layers.size(); ++i) {
    const Layer& layer = structure.layers[i];
    for (size_t s = 0; s < slots.size(); ++s) {
      if (slots[s].layer == layer.shares.value_or(layer.index)) {
        runs.push_back({s, i});
      }
    }
  }
  return runs;
}

namespace {

// The shapes of one adapter's weights at one place, without the bank dimension.
std::map<std::string, std::vector<int64_t>> shapes_of(const PlannedModule& module) {
  std::map<std::string, std::vector<int64_t>> shapes;
  int64_t gates = 0;
  int64_t gate_features = 0;
  if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    shapes = {{"lora_a", {lora->config.r, lora->in_features}},
              {"lora_b", {lora->out_features, lora->config.r}},
              {"scaling", {}}};
    if (lora_form(lora->config) == LoRAForm::kScale) {
      shapes.erase("lora_a");
    } else if (lora_form(lora->config) == LoRAForm::kDora) {
      for (const char* name : {"magnitude", "weight_norm", "fixed"}) {
        shapes[name] = {lora->out_features};
      }
    }
    gates = lora->config.use_gating;
    gate_features = lora->in_features;
  } else if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    const int64_t hidden = bottleneck->hidden_size;
    const int64_t size = bottleneck->bottleneck_size;
    const auto* kind = std::get_if<std::string>(&bottleneck->config.scaling);
    shapes = {{"down_weight", {size, hidden}},
              {"down_bias", {size}},
              {"up_weight", {hidden, size}},
              {"up_bias", {hidden}},
              {"scaling", {kind && *kind == "channel" ? hidden : 1}}};
    for (const std::string& norm : own_norms(bottleneck->config)) {
      shapes[norm + "_weight"] = {hidden};
      shapes[norm + "_bias"] = {hidden};
    }
    gates = bottleneck->config.use_gating;
    gate_features = hidden;
  } else {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    const std::vector<int64_t> shape = {prefix.num_kv_heads, prefix.config.prefix_length, prefix.head_dim};
    shapes = {{"prefix_key", shape}, {"prefix_value", shape}};
    gates = prefix.config.use_gating ? (prefix.config.shared_gating ? 1 : 2) : 0;
    gate_features = prefix.hidden_size;
  }
  if (gates > 0) {
    shapes["gate_weight"] = {gates, gate_features};
    shapes["gate_bias"] = {gates};
  }
  return shapes;
}

// The weights of one adapter at one place: its own, else cut out of the bank (the inverse of stack_parameter).
ModuleWeights unstack(const torch::jit::Module& slot, const Adapter& adapter, size_t index,
                      const PlannedModule& module) {
  const std::string own_name = own_module_name(adapter.name);
  const std::optional<torch::jit::Module> own =
      slot.hasattr(own_name) ? std::optional(slot.attr(own_name).toModule()) : std::nullopt;
  const bool from_mlp = adapter.sources.count(module.location) > 0;
  ModuleWeights weights;
  for (const auto& [name, shape] : shapes_of(module)) {
    if (own && own->hasattr(name)) {
      weights[name] = own->attr(name).toTensor().detach().clone();
      continue;
    }
    if (from_mlp && name.starts_with("prefix_")) {
      continue;
    }
    at::Tensor row = slot.attr(name).toTensor().detach()[static_cast<int64_t>(index)];
    for (size_t i = 0; i < shape.size(); ++i) {
      row = row.narrow(static_cast<int64_t>(i), 0, shape[i]);
    }
    weights[name] = row.clone();
  }
  return weights;
}

AdapterWeights read_weights(const torch::jit::Module& adapters_module, const Adapter& adapter, size_t index) {
  AdapterWeights weights;
  for (const PlannedModule& module : adapter.plan) {
    const auto layer = adapters_module.attr("layer_" + std::to_string(module.number)).toModule();
    weights.push_back(unstack(layer.attr(slot_name(adapter, module)).toModule(), adapter, index, module));
  }
  return weights;
}

// What a trainable adapter's weights are computed from.
Reparametrisation read_sources(const torch::jit::Module& adapters_module, const Adapter& adapter) {
  Reparametrisation sources;
  for (const PlannedModule& module : adapter.plan) {
    const std::string container = module.location + kMlpSuffix;
    const std::string own_name = own_module_name(adapter.name);
    if (sources.count(module.location) || !adapters_module.hasattr(container) ||
        !adapters_module.attr(container).toModule().hasattr(own_name)) {
      continue;
    }
    for (const auto& parameter : adapters_module.attr(container).toModule().attr(own_name).toModule().named_parameters()) {
      sources[module.location][parameter.name] = parameter.value.detach().clone();
    }
  }
  return sources;
}

// The keys and values that the MLPs of a trainable adapter's prefixes make now.
void compute_prefixes(Adapter& adapter) {
  std::map<std::string, at::Tensor> ejected;  // by location
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const auto* prefix = std::get_if<PlannedPrefix>(&adapter.plan[m].method);
    const auto mlp = adapter.sources.find(adapter.plan[m].location);
    if (!prefix || mlp == adapter.sources.end()) {
      continue;
    }
    at::Tensor& states = ejected[mlp->first];
    states = states.defined() ? states : eject(mlp->second, prefix->config.non_linearity);
    std::tie(adapter.weights[m]["prefix_key"], adapter.weights[m]["prefix_value"]) = prefix_of_layer(states, *prefix);
  }
}

}  // namespace

AdapterWeights read_row(const torch::jit::Module& adapters_module, size_t row, const Plan& plan) {
  return read_weights(adapters_module, {"", {}, plan}, row);
}

std::vector<Adapter> read_adapters(const torch::jit::Module& adapters_module, const Structure& structure) {
  std::vector<Adapter> adapters;
  const auto names = adapters_module.attr("names").toListRef();
  const auto configs = adapters_module.attr("configs").toListRef();
  const bool has_merged = adapters_module.hasattr("merged");  // files of 0.1.0 have no such list
  for (size_t a = 0; a < names.size(); ++a) {
    Adapter adapter{names[a].toStringRef(), config_from_json(configs[a].toStringRef())};
    adapter.plan = make_plan(structure, adapter.config);
    adapter.merged = has_merged && adapters_module.attr("merged").toBoolList()[a];
    adapter.trainable = adapters_module.hasattr("trainable") && adapters_module.attr("trainable").toBoolList()[a];
    adapter.sources = read_sources(adapters_module, adapter);
    adapter.weights = read_weights(adapters_module, adapter, a);
    compute_prefixes(adapter);
    adapters.push_back(std::move(adapter));
  }
  return adapters;
}

}  // namespace torchgraft
