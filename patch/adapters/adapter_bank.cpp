#include <torchgraft/patch/adapters/adapter_bank.h>

#include <torchgraft/plan/locations.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/reft_weights.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <tuple>

namespace torchgraft {
namespace {

// The dropout that changes the graph around the op. It acts in training only. Prefixes have theirs before the bank.
double dropout_at(const Adapter& adapter, const PlannedModule& module) {
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    return adapter.trainable ? bottleneck->config.dropout : 0.0;
  }
  if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
    return adapter.trainable ? reft->config.dropout : 0.0;
  }
  const auto* lora = std::get_if<PlannedLoRA>(&module.method);
  return adapter.trainable && lora ? lora->config.dropout : 0.0;
}

// The share of rows in which a bottleneck does not act, in training only. The library's ParallelAdapter does without.
double stochastic_depth_at(const Adapter& adapter, const PlannedModule& module) {
  const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
  const bool drops = adapter.trainable && bottleneck && !bottleneck->config.is_parallel;
  return drops ? bottleneck->config.stochastic_depth : 0.0;
}

}  // namespace

bool shares_lora_a(const PlannedModule& module) { return lora_factors(module) == LoRAFactors::kVera; }

std::string slot_name(const PlannedModule& module) {
  std::string result = module.site;
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    result.append("_").append(to_string(bottleneck_form(*bottleneck)));
  } else if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
    result.append("_nice_").append(invertible->config.non_linearity);
    result.append(invertible->inverts_output ? "" : "_forward");
  } else if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    result.append(shares_lora_a(module) ? "_vera" : "");
    const LoRAForm form = lora_form(lora->config);
    if (form != LoRAForm::kAdd) {
      result.append(form == LoRAForm::kScale ? "_scale" : "_dora");
    }
  } else if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
    result.append("_").append(reft_non_linearity(reft->config));
  }
  return result;
}

std::string slot_name(const Adapter& adapter, const PlannedModule& module) {
  const std::string name = slot_name(module);
  const bool drops = dropout_at(adapter, module) > 0.0 || stochastic_depth_at(adapter, module) > 0.0;
  return drops ? name + "_dropout_" + attribute_text(adapter.name) : name;
}

bool broadcasts(const std::string& parameter, int64_t dim) {
  const bool has_units = parameter == "projection" || parameter.starts_with("source_");
  return ((has_units || parameter.starts_with("gate_")) && dim == 0) || parameter == "scaling";
}

double missing_value(const std::string& parameter) {
  // What is divided by it is not used, but a quotient of zeros would make NaN of gradients.
  return parameter == "weight_norm" ? 1.0 : parameter == "gate_bias" ? std::numeric_limits<double>::infinity() : 0.0;
}

void write_parameter(at::Tensor row, const std::string& parameter, const at::Tensor& value) {
  for (int64_t i = 0; i < row.dim(); ++i) {
    if (!broadcasts(parameter, i)) {
      row = row.narrow(i, 0, value.size(i));
    }
  }
  row.copy_(value.detach());
}

at::Tensor stack_rows(const std::string& parameter, const std::vector<std::pair<size_t, at::Tensor>>& rows,
                      size_t count) {
  TORCH_INTERNAL_ASSERT(!rows.empty(), "no row of ", parameter);
  std::vector<int64_t> sizes;
  for (const auto& [row, value] : rows) {
    TORCH_INTERNAL_ASSERT(value.scalar_type() == rows.back().second.scalar_type(), "rows of ", parameter, " in ",
                          value.scalar_type(), " and in ", rows.back().second.scalar_type());
    sizes.resize(std::max<size_t>(sizes.size(), value.dim()), 0);
    for (int64_t i = 0; i < value.dim(); ++i) {
      sizes[i] = std::max(sizes[i], value.size(i));
    }
  }
  sizes.insert(sizes.begin(), static_cast<int64_t>(count));
  const double absent = parameter == "weight_norm" ? missing_value(parameter) : 0.0;
  at::Tensor bank = at::full(sizes, absent, rows.back().second.options().requires_grad(false));
  for (const auto& [row, value] : rows) {
    write_parameter(bank[static_cast<int64_t>(row)], parameter, value);
  }
  return bank;
}

namespace {

// Members of one bank: (adapter, index into its plan).
using Members = std::vector<std::pair<size_t, size_t>>;

// One parameter of the members as a bank [N, ...].
at::Tensor stack_parameter(const std::vector<Adapter>& adapters, const Members& members, const std::string& name) {
  std::vector<std::pair<size_t, at::Tensor>> rows;
  std::vector<size_t> missing;
  for (const auto& [adapter, module] : members) {
    const ModuleWeights& weights = adapters[adapter].weights[module];
    if (const auto found = weights.find(name); found != weights.end()) {
      rows.emplace_back(adapter, found->second);
    } else {
      missing.push_back(adapter);
    }
  }
  at::Tensor bank = stack_rows(name, rows, adapters.size());
  for (const size_t adapter : missing) {
    bank[static_cast<int64_t>(adapter)].fill_(missing_value(name));
  }
  return bank;
}

// The own parameters of a trainable member, and the shapes of its computed weights.
OwnWeights own_weights(const Adapter& adapter, size_t index, const PlannedModule& module,
                       const ModuleWeights& weights) {
  OwnWeights own{index, adapter.name, module};
  for (const std::string& name : computed_weights(adapter, module)) {
    own.computed[name] = weights.at(name).sizes().vec();
  }
  for (const auto& [name, tensor] : weights) {
    if (is_trained(name, module) && !own.computed.count(name)) {
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

// How long each prompt is, and how many tokens come before it.
void add_prompt_places(Slot& slot, const std::vector<Adapter>& adapters, const Members& members) {
  std::vector<int64_t> lengths(adapters.size(), 0);
  std::vector<int64_t> begins(adapters.size(), 0);
  for (const auto& [a, m] : members) {
    const PromptTuningConfig& config = std::get<PlannedPrompt>(adapters[a].plan[m].method).config;
    lengths[a] = config.prompt_length;
    begins[a] = prompt_begin(config);
  }
  const auto device = slot.parameters.at("prompt").device();
  slot.parameters["prompt_length"] = at::tensor(lengths, at::kLong).to(device);
  slot.parameters["prompt_begin"] = at::tensor(begins, at::kLong).to(device);
}

Slot stack_slot(const std::vector<Adapter>& adapters, const Members& members) {
  at::NoGradGuard no_grad;
  const PlannedModule& first = adapters[members[0].first].plan[members[0].second];
  const Adapter& adapter = adapters[members[0].first];
  Slot slot{first.layer, first.number, first.location, first.site, slot_name(adapter, first)};
  slot.dropout = dropout_at(adapter, first);
  slot.stochastic_depth = stochastic_depth_at(adapter, first);
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&first.method)) {
    slot.form = bottleneck_form(*bottleneck);
  } else if (const auto* lora = std::get_if<PlannedLoRA>(&first.method)) {
    slot.lora = lora_form(lora->config);
  } else if (const auto* invertible = std::get_if<PlannedInvertible>(&first.method)) {
    slot.form.non_linearity = invertible->config.non_linearity;
    slot.inverts_output = invertible->inverts_output;
  } else if (const auto* reft = std::get_if<PlannedReft>(&first.method)) {
    slot.non_linearity = reft_non_linearity(reft->config);
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
  if (!slot.form.is_plain() || slot.lora != LoRAForm::kAdd || slot.site == "inv_adapter") {
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
  if (std::holds_alternative<PlannedPrompt>(first.method)) {
    add_prompt_places(slot, adapters, members);
  }
  for (const auto& [a, m] : members) {
    if (adapters[a].trainable) {
      slot.own.push_back(own_weights(adapters[a], a, adapters[a].plan[m], adapters[a].weights[m]));
      for (const auto& [name, tensor] : slot.own.back().parameters) {
        slot.parameters.at(name)[static_cast<int64_t>(a)].zero_();  // this row is never read
      }
    }
  }
  return slot;
}

}  // namespace

bool Slot::has_bank(const std::string& parameter) const {
  const bool is_alone = gates.size() == 1 && !own.empty();
  return !is_alone || !(own[0].parameters.count(parameter) || own[0].computed.count(parameter));
}

bool is_trained(const std::string& parameter, bool scaling_is_trained) {
  static const std::set<std::string> kFixed = {"prefix_length", "present",     "weight_norm",   "fixed",
                                               "positions",     "subtraction", "prompt_length", "prompt_begin"};
  return !kFixed.count(parameter) && (parameter != "scaling" || scaling_is_trained);
}

bool is_trained(const std::string& parameter, const PlannedModule& module) {
  const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
  if (!bottleneck) {
    return is_trained(parameter, /*scaling_is_trained=*/false);
  }
  const bool is_bias = parameter == "down_bias" || parameter == "up_bias";
  const bool is_absent = is_bias && bottleneck->config.phm_layer && !bottleneck->config.phm_bias;
  return !is_absent && is_trained(parameter, bottleneck_form(*bottleneck).scaling_is_trained);
}

std::set<std::string> computed_weights(const Adapter& adapter, const PlannedModule& module) {
  if (!adapter.trainable) {
    return {};
  }
  if (const auto* prefix = std::get_if<PlannedPrefix>(&module.method); prefix && adapter.sources.count(prefix->pool)) {
    return {"prefix_key", "prefix_value"};
  }
  if (has_phm_factors(module, adapter.sources)) {
    return {"down_weight", "up_weight"};
  }
  std::set<std::string> result;
  if (has_reft_sources(module, adapter.sources)) {
    return {"projection"};
  }
  const auto* lora = std::get_if<PlannedLoRA>(&module.method);
  if (lora && lora_form(lora->config) == LoRAForm::kDora) {
    result.insert("weight_norm");
  }
  if (has_lora_factors(module, adapter.sources)) {
    const auto names = factored_names(module);
    result.insert(names.begin(), names.end());
  }
  return result;
}

namespace {

// Banks lora_a by their rows: the adapters, and the tensors in them.
using KnownBanks = std::map<std::vector<std::pair<size_t, const c10::TensorImpl*>>, at::Tensor>;

// Takes the known bank lora_a instead of the slot's own where both have the same tensors of the same adapters, as those
// of VeRA have in all layers. A file holds it once, and so does memory.
void share_bank(const std::vector<Adapter>& adapters, const Members& members, Slot& slot, KnownBanks& known) {
  const auto found = slot.parameters.find("lora_a");
  if (found == slot.parameters.end()) {
    return;
  }
  KnownBanks::key_type rows;
  for (const auto& [adapter, module] : members) {
    rows.emplace_back(adapter, adapters[adapter].weights[module].at("lora_a").unsafeGetTensorImpl());
  }
  found->second = known.emplace(std::move(rows), found->second).first->second;
}

}  // namespace

std::vector<Slot> stack_banks(const std::vector<Adapter>& adapters) {
  std::map<std::tuple<int64_t, size_t, std::string>, Members> groups;
  for (size_t a = 0; a < adapters.size(); ++a) {
    for (size_t m = 0; m < adapters[a].plan.size(); ++m) {
      const PlannedModule& module = adapters[a].plan[m];
      groups[{module.layer, execution_order(module.site), slot_name(adapters[a], module)}].emplace_back(a, m);
    }
  }
  std::vector<Slot> slots;
  KnownBanks known;
  for (const auto& [key, members] : groups) {
    slots.push_back(stack_slot(adapters, members));
    share_bank(adapters, members, slots.back(), known);
  }
  return slots;
}

std::vector<SlotRun> slot_runs(const std::vector<Slot>& slots, const Structure& structure) {
  std::vector<SlotRun> runs;
  for (size_t i = 0; i < structure.layers.size(); ++i) {
    const Layer& layer = structure.layers[i];
    for (size_t s = 0; s < slots.size(); ++s) {
      const bool is_outside =
          linear_map_position(slots[s].site) || slots[s].site == "inv_adapter" || slots[s].site == "prompt_tuning";
      const bool runs_again = layer.shares && !is_outside;
      if (slots[s].layer == layer.index || (runs_again && slots[s].layer == *layer.shares)) {
        runs.push_back({s, i});
      }
    }
  }
  return runs;
}

bool has_gate(const Slot& slot) { return slot.site != "output_reft" && !is_prompt(slot); }

bool is_prompt(const Slot& slot) { return slot.site == "prompt_tuning"; }

std::vector<SlotRun> gated_runs(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs) {
  std::vector<SlotRun> result;
  std::copy_if(runs.begin(), runs.end(), std::back_inserter(result),
               [&](const SlotRun& run) { return has_gate(slots[run.slot]); });
  return result;
}

}  // namespace torchgraft
