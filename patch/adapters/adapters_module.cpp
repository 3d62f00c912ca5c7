#include <torchgraft/patch/adapters/adapters_module.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/reparametrisation.h>

#include <ATen/ATen.h>

#include <regex>
#include <tuple>

namespace torchgraft {
namespace {

using torch::jit::Module;

// `gates` has one tensor [B, G] per inserted op, in the order of gate_layers, gate_locations and gate_counts. An
// adapter has the rows that adapter_ids gives it or, without adapter_ids, all rows when it is active. NAMES and CONFIGS
// stand for the lists by id, which have compositions, too, where there are some; COLLECT for the name of the last
// method.
constexpr const char* kAdaptersMethods = R"python(
def activate(self, name: str) -> None:
    found = -1
    for i in range(len(self.NAMES)):
        if self.NAMES[i] == name:
            found = i
    assert found >= 0, "activate: no adapter is called '" + name + "'; there are: " + ", ".join(self.NAMES)
    self.active = found

def deactivate(self) -> None:
    self.active = -1

def active_adapter(self) -> Optional[str]:
    if self.active < 0:
        return None
    return self.NAMES[self.active]

def adapter_names(self) -> List[str]:
    result: List[str] = []
    for name in self.NAMES:
        result.append(name)
    return result

def adapter_config(self, name: str) -> str:
    found = -1
    for i in range(len(self.NAMES)):
        if self.NAMES[i] == name:
            found = i
    assert found >= 0, "adapter_config: no adapter is called '" + name + "'; there are: " + ", ".join(self.NAMES)
    return self.CONFIGS[found]

def COLLECT(self, gates: List[Tensor], adapter_ids: Optional[Tensor]) -> Dict[str, Dict[int, Dict[str, Tensor]]]:
    result: Dict[str, Dict[int, Dict[str, Tensor]]] = {}
    for a in range(len(self.names)):
        present = a == self.active
        rows: Optional[Tensor] = None
        if adapter_ids is not None:
            chosen = torch.nonzero(torch.eq(adapter_ids, a)).view(-1)
            present = chosen.numel() > 0
            rows = chosen
        if present:
            layers: Dict[int, Dict[str, Tensor]] = {}
            for i in range(len(gates)):
                count = self.gate_counts[i][a]
                if gates[i].dim() < 2:  # of a branch that did not run
                    count = 0
                if count > 0:
                    gate = gates[i].narrow(1, 0, count)
                    if rows is not None:
                        gate = gate.index_select(0, rows)
                    layer = self.gate_layers[i]
                    location = self.gate_locations[i]
                    if layer not in layers:
                        empty: Dict[str, Tensor] = {}
                        layers[layer] = empty
                    if location in layers[layer]:
                        gate = torch.cat([layers[layer][location], gate], 1)
                    layers[layer][location] = gate
            result[self.names[a]] = layers
    return result
)python";

std::string adapters_methods(bool has_compositions) {
  std::string methods = kAdaptersMethods;
  for (const auto& [word, plain, composed] :
       {std::tuple("NAMES", "names", "all_names"), std::tuple("CONFIGS", "configs", "all_configs"),
        std::tuple("COLLECT", "collect_gates", "collect_adapter_gates")}) {
    methods = std::regex_replace(methods, std::regex(word), has_compositions ? composed : plain);
  }
  return methods + (has_compositions ? kComposedMethods : "");
}

Module child(Module& parent, const std::string& name, const std::string& class_name,
             const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
  Module module(c10::QualifiedName("__torch__.torchgraft." + class_name), unit, /*shouldMangle=*/true);
  module.register_attribute("training", c10::BoolType::get(), false);
  parent.register_module(name, module);
  return module;
}

// Returns the child of that name; makes it if need be.
Module child_once(Module& parent, const std::string& name, const std::string& class_name,
                  const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
  return parent.hasattr(name) ? parent.attr(name).toModule() : child(parent, name, class_name, unit);
}

void register_own(Module& parent, const std::string& adapter, const std::map<std::string, at::Tensor>& parameters,
                  const std::shared_ptr<torch::jit::CompilationUnit>& unit, bool is_trained = true) {
  Module own = child(parent, own_module_name(adapter), "TrainableAdapter", unit);
  for (const auto& [name, tensor] : parameters) {
    const bool requires_grad = is_trained && is_trained_source(name);
    own.register_parameter(name, tensor.detach().set_requires_grad(requires_grad), /*is_buffer=*/!requires_grad);
  }
}

template <typename Value, typename Get>
c10::IValue list_of(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs, Get get) {
  c10::List<Value> result;
  for (const SlotRun& run : runs) {
    result.push_back(get(slots[run.slot]));
  }
  return result;
}

// What grafted_forward's gates are of, in their order.
void register_gates(Module& root, const std::vector<Slot>& slots, const std::vector<SlotRun>& gated) {
  const auto strings = c10::ListType::ofStrings();
  root.register_attribute("gate_layers", c10::ListType::ofInts(),
                          list_of<int64_t>(slots, gated, [](const Slot& slot) { return slot.number; }));
  root.register_attribute("gate_locations", strings,
                          list_of<std::string>(slots, gated, [](const Slot& slot) { return slot.location; }));
  root.register_attribute("gate_slots", strings, list_of<std::string>(slots, gated, [](const Slot& slot) {
                            return "layer_" + std::to_string(slot.number) + "." + slot.name;
                          }));
  c10::List<c10::List<int64_t>> counts;
  for (const SlotRun& run : gated) {
    counts.push_back(c10::List<int64_t>(slots[run.slot].gates));
  }
  root.register_attribute("gate_counts", c10::ListType::create(c10::ListType::ofInts()), counts);
}

}  // namespace

std::string own_module_name(const std::string& adapter) { return "adapter_" + attribute_text(adapter); }

at::Tensor pools_all(const std::vector<Adapter>& adapters) {
  at::Tensor result = at::ones({static_cast<int64_t>(adapters.size()) + 1}, at::kBool);
  for (size_t a = 0; a < adapters.size(); ++a) {
    result[static_cast<int64_t>(a)] = !pools_unpadded(adapters[a].config);
  }
  return result;
}

std::vector<std::string> adapter_names(const Module& adapters_module) {
  std::vector<std::string> names;
  for (const c10::IValue& name : adapters_module.attr("names").toListRef()) {
    names.push_back(name.toStringRef());
  }
  return names;
}

namespace {

size_t position_of(const std::vector<std::string>& names, const std::string& name, const char* what) {
  std::vector<Adapter> named;
  for (const std::string& adapter : names) {
    named.push_back({adapter, {}});
  }
  return find_adapter(named, name, what);
}

}  // namespace

size_t find_adapter(const torch::jit::Module& adapters_module, const std::string& name, const char* what) {
  return position_of(adapter_names(adapters_module), name, what);
}

int64_t find_id(const torch::jit::Module& adapters_module, const std::string& name, const char* what) {
  return static_cast<int64_t>(position_of(names_by_id(adapters_module), name, what));
}

Module make_adapters_module(const std::vector<Adapter>& adapters, const std::vector<Slot>& slots,
                            const std::vector<SlotRun>& runs, const std::shared_ptr<torch::jit::CompilationUnit>& unit,
                            const std::vector<NamedComposition>& compositions) {
  Module root(c10::QualifiedName("__torch__.torchgraft.Adapters"), unit, /*shouldMangle=*/true);
  root.register_attribute("training", c10::BoolType::get(), false);
  c10::List<std::string> names;
  c10::List<std::string> configs;
  c10::List<bool> merged;
  c10::List<bool> trainable;
  for (const Adapter& adapter : adapters) {
    names.push_back(adapter.name);
    configs.push_back(config_to_json(adapter.config));
    merged.push_back(adapter.merged);
    trainable.push_back(adapter.trainable);
  }
  const auto strings = c10::ListType::ofStrings();
  root.register_attribute("names", strings, names);
  root.register_attribute("configs", strings, configs);
  root.register_attribute("merged", c10::ListType::ofBools(), merged);
  root.register_attribute("trainable", c10::ListType::ofBools(), trainable);
  root.register_attribute("active", c10::IntType::get(), -1);
  register_gates(root, slots, gated_runs(slots, runs));
  for (const Slot& slot : slots) {
    const std::string layer_name = "layer_" + std::to_string(slot.number);
    Module layer = child_once(root, layer_name, "AdapterLayer", unit);
    Module module = child(layer, slot.name, "AdapterSlot", unit);
    for (const auto& [name, tensor] : slot.parameters) {
      if (slot.has_bank(name)) {
        const bool is_buffer = !is_trained(name, slot.form.scaling_is_trained);
        module.register_parameter(name, tensor.detach().set_requires_grad(false), is_buffer);
      }
    }
    for (const OwnWeights& own : slot.own) {
      register_own(module, own.name, own.parameters, unit);
    }
  }
  for (const Adapter& adapter : adapters) {
    for (const auto& [source, weights] : adapter.sources) {
      Module container = child_once(root, source + kSourceSuffix, "WeightSources", unit);
      register_own(container, adapter.name, weights, unit, /*is_trained=*/source != kSharedVera);
    }
  }
  if (!compositions.empty()) {
    register_compositions(root, adapters, compositions);
  }
  root.define(adapters_methods(!compositions.empty()));
  return root;
}

}  // namespace torchgraft
