#include <torchgraft/patch/pool/pool_banks.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/pool/row_size.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <map>
#include <set>

namespace torchgraft {
namespace {

using torch::jit::Module;

std::string slot_path(const PlannedModule& module) {
  return "layer_" + std::to_string(module.number) + "." + slot_name(module);
}

// A bank [capacity, ...] for rows like those of `bank`, without any adapter.
at::Tensor empty_bank(const std::string& name, const at::Tensor& bank, int64_t capacity) {
  std::vector<int64_t> sizes = bank.sizes().vec();
  sizes[0] = capacity;
  return at::full(sizes, missing_value(name), bank.options().requires_grad(false));
}

template <typename Value>
c10::List<Value> repeated(int64_t count, const Value& value) {
  c10::List<Value> list;
  for (int64_t i = 0; i < count; ++i) {
    list.push_back(value);
  }
  return list;
}

// One adapter of each configuration: build() makes banks that hold them.
std::vector<Adapter> templates(const std::vector<AdapterConfig>& room, const Draft& draft) {
  std::vector<Adapter> result;
  for (const AdapterConfig& config : room) {
    const AdapterSpec spec{"room_" + std::to_string(result.size()), config, std::nullopt, ""};
    result.push_back(make_adapter(spec, draft.sites.structure, draft.weights));
  }
  return result;
}

}  // namespace

PoolBanks::PoolBanks(Draft draft, std::vector<AdapterConfig> room, const std::vector<PoolShape>& shapes,
                     int64_t capacity, int64_t max_row_bytes)
    : room_(std::move(room)) {
  draft.adapters = templates(room_, draft);
  draft.compositions.clear();
  draft.inserting.pool_rows = capacity;
  add_shapes(shapes, draft.adapters, draft.compositions, [&](const std::string& name, const AdapterConfig& config) {
    return make_adapter({name, config, std::nullopt, ""}, draft.sites.structure, draft.weights);
  });
  poolings_ = gate_poolings(draft.adapters);
  module_ = build(std::move(draft), /*active=*/"");
  module_.eval();
  if (max_row_bytes > 0) {
    check_row_bytes(max_row_bytes);
  }
  allocate_banks(capacity);
  if (!shapes.empty()) {
    number_compositions(capacity);
  }
}

// Called before `capacity` rows are allocated.
void PoolBanks::check_row_bytes(int64_t limit) const {
  int64_t bytes = 0;
  std::set<const void*> counted;  // VeRA's lora_a is one bank for all layers
  for (const auto& bank : module_.attr("adapters").toModule().named_attributes(/*recurse=*/true)) {
    if (bank.value.isTensor() && bank.name != kPoolsAll && counted.insert(bank.value.toTensor().data_ptr()).second) {
      const at::Tensor& tensor = bank.value.toTensor();
      bytes += static_cast<int64_t>(tensor.nbytes()) / std::max<int64_t>(tensor.size(0), 1);
    }
  }
  check_row_limit(static_cast<double>(bytes), limit);
}

// Gives every bank of the module `capacity` rows, and keeps the banks by slot.
void PoolBanks::allocate_banks(int64_t capacity) {
  Module root = module_.attr("adapters").toModule();
  std::map<const void*, at::Tensor> made;  // by the memory of a lora_a: what slots share stays shared
  for (const auto& layer : root.named_children()) {
    for (auto slot : layer.value.named_children()) {
      Slot& kept = slots_.emplace_back(Slot{layer.name + "." + slot.name, {}});
      for (const auto& attribute : slot.value.named_attributes(/*recurse=*/false)) {
        if (attribute.value.isTensor()) {
          const at::Tensor& made_by_build = attribute.value.toTensor();
          at::Tensor bank = empty_bank(attribute.name, made_by_build, capacity);
          if (attribute.name == "lora_a") {
            bank = made.emplace(made_by_build.unsafeGetTensorImpl()->storage().data(), bank).first->second;
          }
          slot.value.setattr(attribute.name, bank);
          kept.parameters[attribute.name] = bank;
        }
      }
    }
  }
  root.setattr("names", repeated<std::string>(capacity, ""));
  root.setattr("configs", repeated<std::string>(capacity, ""));
  root.setattr("merged", repeated<bool>(capacity, false));
  root.setattr("trainable", repeated<bool>(capacity, false));
  c10::List<c10::List<int64_t>> counts;
  for (size_t run = 0; run < root.attr("gate_slots").toListRef().size(); ++run) {
    counts.push_back(repeated<int64_t>(capacity, 0));
  }
  root.setattr("gate_counts", counts);
  if (poolings_.is_mixed()) {
    root.setattr(kPoolsAll, at::ones({capacity + 1}, root.attr(kPoolsAll).toTensor().options()));
  }
}

// Ids of compositions begin behind the rows.
void PoolBanks::number_compositions(int64_t capacity) {
  Module root = module_.attr("adapters").toModule();
  c10::List<int64_t> ids;
  const auto compositions = root.attr(kCompositionParts).toListRef();
  for (size_t i = 0; i < compositions.size(); ++i) {
    for (size_t part = 0; part < compositions[i].toListRef().size(); ++part) {
      ids.push_back(capacity + static_cast<int64_t>(i));
    }
  }
  root.setattr("composed_ids", ids);
}

void PoolBanks::compose(size_t shape, const std::string& name, const std::vector<std::string>& parts,
                        const std::vector<int64_t>& rows) {
  const Module root = module_.attr("adapters").toModule();
  const auto all = root.attr(kCompositionParts).toList();
  size_t key = 0;  // of the composition's first part
  for (size_t i = 0; i < shape; ++i) {
    key += all.get(i).toListRef().size();
  }
  const auto held = all.get(shape).toList();
  TORCH_INTERNAL_ASSERT(held.size() == rows.size() && parts.size() == rows.size(), name, " has ", rows.size(),
                        " adapters, its shape ", held.size());
  const auto keys = root.attr("composed_keys").toList();
  for (size_t i = 0; i < rows.size(); ++i) {
    held.set(i, rows[i]);
    keys.set(key + i, name + "." + parts[i]);
  }
}

std::string PoolBanks::misfit(const Adapter& adapter) const {
  if (has_gates(adapter.config) && !(pools_unpadded(adapter.config) ? poolings_.unpadded : poolings_.all)) {
    return "no gates over " + adapter.config.gate_pooling + " tokens";
  }
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const std::string path = slot_path(adapter.plan[m]);
    const auto slot =
        std::find_if(slots_.begin(), slots_.end(), [&](const Slot& candidate) { return candidate.path == path; });
    if (slot == slots_.end()) {
      return "no bank for " + path;
    }
    for (const auto& [name, value] : adapter.weights[m]) {
      const auto bank = slot->parameters.find(name);
      if (bank == slot->parameters.end()) {
        return "no " + name + " in the bank of " + path;
      }
      const auto room = bank->second.sizes().slice(1);
      for (size_t i = 0; i < room.size(); ++i) {
        const int64_t size = static_cast<int64_t>(i) < value.dim() ? value.size(static_cast<int64_t>(i)) : 1;
        if (broadcasts(name, static_cast<int64_t>(i)) ? size != room[i] && size != 1 : size > room[i]) {
          return c10::str("no room for ", name, " ", value.sizes(), " in the bank of ", path, ", which has ", room);
        }
      }
    }
  }
  return "";
}

// Puts each parameter together beside the bank and then copies it over the whole row: nothing is left of an earlier
// adapter, whatever its ranks. `weights` is null when the adapter does not have this slot.
void PoolBanks::write_slot(const Slot& slot, int64_t row, const ModuleWeights* weights, const PlannedModule* module) {
  for (const auto& [name, bank] : slot.parameters) {
    const at::Tensor target = bank.select(0, row);
    at::Tensor value = at::full(target.sizes(), missing_value(name), target.options());
    if (name == "present") {
      value.fill_(weights != nullptr);
    } else if (name == "prefix_length") {
      value.fill_(weights ? weights->at("prefix_key").size(1) : 0);
    } else if (name == "prompt_length") {
      value.fill_(weights ? weights->at("prompt").size(0) : 0);
    } else if (name == "prompt_begin") {
      value.fill_(module ? prompt_begin(std::get<PlannedPrompt>(module->method).config) : 0);
    } else if (weights && weights->count(name)) {
      write_parameter(value, name, weights->at(name));
    }
    target.copy_(value);
  }
}

void PoolBanks::write(int64_t row, const Adapter& adapter) {
  at::NoGradGuard no_grad;
  TORCH_INTERNAL_ASSERT(misfit(adapter).empty(), misfit(adapter));
  std::map<std::string, size_t> modules;  // slot path -> index into the plan
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    modules[slot_path(adapter.plan[m])] = m;
  }
  const auto weights_at = [&](const std::string& path) {
    const auto module = modules.find(path);
    return module == modules.end() ? nullptr : &adapter.weights[module->second];
  };
  const auto module_at = [&](const std::string& path) {
    const auto module = modules.find(path);
    return module == modules.end() ? nullptr : &adapter.plan[module->second];
  };
  for (const bool has_slot : {false, true}) {  // in this order: slots may share a bank, which keeps what comes last
    for (const Slot& slot : slots_) {
      if (const ModuleWeights* weights = weights_at(slot.path); (weights != nullptr) == has_slot) {
        write_slot(slot, row, weights, module_at(slot.path));
      }
    }
  }
  // forward_with_gates reads these lists at the rows of its batch only: a pass over other rows reads nothing that
  // changes here.
  const Module root = module_.attr("adapters").toModule();
  root.attr("names").toList().set(row, adapter.name);
  root.attr("configs").toList().set(row, config_to_json(adapter.config));
  root.attr("merged").toBoolList().set(row, adapter.merged);
  if (poolings_.is_mixed()) {
    root.attr(kPoolsAll).toTensor()[row] = !pools_unpadded(adapter.config);
  }
  const auto slots = root.attr("gate_slots").toListRef();
  const auto counts = root.attr("gate_counts").toList();
  for (size_t run = 0; run < slots.size(); ++run) {
    const ModuleWeights* weights = weights_at(slots[run].toStringRef());
    const bool gated = weights && weights->count("gate_bias");
    counts.get(run).toIntList().set(row, gated ? weights->at("gate_bias").size(0) : 0);
  }
}

AdapterWeights PoolBanks::read(int64_t row, const Plan& plan) const {
  return read_row(module_.attr("adapters").toModule(), static_cast<size_t>(row), plan);
}

int64_t PoolBanks::row_bytes() const {
  int64_t bytes = 0;
  std::set<const void*> counted;
  for (const Slot& slot : slots_) {
    for (const auto& [name, bank] : slot.parameters) {
      const bool is_new = counted.insert(bank.data_ptr()).second;
      bytes += is_new ? static_cast<int64_t>(bank.nbytes()) / bank.size(0) : 0;
    }
  }
  return bytes;
}

}  // namespace torchgraft
