#include <torchgraft/patch/adapters/compositions.h>

#include <torchgraft/config/composition_tasks.h>
#include <torchgraft/config/config_json.h>
#include <torchgraft/patch/adapters/parallel_rows.h>

#include <algorithm>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

const char* const kComposedMethods = R"python(
def has_rows(self, id: int, adapter_ids: Optional[Tensor]) -> bool:
    if adapter_ids is None:
        return id == self.active
    return bool(adapter_ids.eq(id).any())

def add_gate(self, gate: Tensor, name: str, layer: int, location: str,
             result: Dict[str, Dict[int, Dict[str, Tensor]]]) -> None:
    layers = result[name]
    if layer not in layers:
        empty: Dict[str, Tensor] = {}
        layers[layer] = empty
    if location in layers[layer]:
        gate = torch.cat([layers[layer][location], gate], 1)
    layers[layer][location] = gate

def collect_gates(self, gates: List[Tensor], adapter_ids: Optional[Tensor]) -> Dict[str, Dict[int, Dict[str, Tensor]]]:
    result = self.collect_adapter_gates(gates[:len(self.gate_counts)], adapter_ids)
    present: List[bool] = []
    for i in range(len(self.composed_keys)):
        present.append(self.has_rows(self.composed_ids[i], adapter_ids))
        if present[i]:
            none: Dict[int, Dict[str, Tensor]] = {}
            result[self.composed_keys[i]] = none
    for i in range(len(self.composed_gate_keys)):
        key = self.composed_gate_keys[i]
        if present[key]:
            name = self.composed_keys[key]
            gate = gates[len(self.gate_counts) + i]
            self.add_gate(gate, name, self.composed_gate_layers[i], self.composed_gate_locations[i], result)
    return result
)python";

namespace {

// As parse_heads_from_composition: the adapter that ends a Stack. -2: there is none. Channels of a Parallel have heads
// of their own (channel_heads); -1 keeps their place.
int64_t head_of(const Composition& tree, const std::vector<Adapter>& adapters) {
  const std::vector<std::string> channels = channel_heads(tree);
  if (!channels.empty()) {
    return channels.size() > 1 ? -1 : static_cast<int64_t>(find_adapter(adapters, channels.front(), "compose"));
  }
  if (tree.kind != BlockKind::kStack || tree.children.back().kind != BlockKind::kAdapter) {
    return -2;
  }
  return static_cast<int64_t>(find_adapter(adapters, tree.children.back().name, "compose"));
}

// Where an adapter acts: layer and site of each of its modules.
std::set<std::pair<int64_t, std::string>> places_of(const Adapter& adapter) {
  std::set<std::pair<int64_t, std::string>> places;
  for (const PlannedModule& module : adapter.plan) {
    places.emplace(module.layer, module.site);
  }
  return places;
}

// The library joins what the tasks' adapters have made, and lets the last of them add it to the layer's result.
void check_task_adapters(const NamedComposition& composition, const std::vector<Adapter>& adapters, const char* what) {
  const std::string begin =
      std::string(what) + ": '" + composition.name + "', " + composition_to_string(composition.tree) + ": ";
  for (const std::string& part : adapters_in(composition.tree)) {
    for (const PlannedModule& module : adapters[find_adapter(adapters, part, what)].plan) {
      const auto* lora = std::get_if<PlannedLoRA>(&module.method);
      TORCH_CHECK(lora, begin, "the adapters library has MultiTask for LoRAs only, and '", part, "' has ", module.site,
                  "; give each row the id of its adapter in adapter_ids");
      TORCH_CHECK(lora->config.composition_mode == "add" && !lora->config.use_dora, begin, "'", part, "' is (IA)^3 or ",
                  "DoRA, whose tasks the adapters library mixes: the last one scales the rows of all; give each row ",
                  "the id of its adapter in adapter_ids");
    }
  }
  const std::vector<std::string> parts = adapters_in_tasks(composition.tree);
  const auto expected = parts.empty() ? decltype(places_of(adapters.front()))()
                                      : places_of(adapters[find_adapter(adapters, parts.front(), what)]);
  for (const std::string& part : parts) {
    TORCH_CHECK(places_of(adapters[find_adapter(adapters, part, what)]) == expected, begin, "'", part, "' and '",
                parts.front(), "' act in different places, where the adapters library cannot join their results; give ",
                "all tasks the same locations, attn_matrices and leave_out, or each row the id of its adapter in ",
                "adapter_ids");
  }
}

}  // namespace

const NamedComposition* find_fused(const std::vector<NamedComposition>& compositions, const std::string& name) {
  for (const NamedComposition& composition : compositions) {
    if (composition.name == name && !fusion_names(composition.tree).empty()) {
      return &composition;
    }
  }
  return nullptr;
}

void check_not_composed(const std::vector<NamedComposition>& compositions, const std::vector<std::string>& names,
                        const char* what) {
  for (const NamedComposition& composition : compositions) {
    for (const std::string& part : adapters_in(composition.tree)) {
      TORCH_CHECK(std::find(names.begin(), names.end(), part) == names.end(), what, ": the composition '",
                  composition.name, "', ", composition_to_string(composition.tree), ", uses '", part,
                  "'; remove the composition first, or with it");
    }
  }
}

void check_parts(const NamedComposition& composition, const std::vector<Adapter>& adapters, const char* what) {
  for (const std::string& part : adapters_in(composition.tree)) {
    const Adapter& adapter = adapters[find_adapter(adapters, part, what)];
    TORCH_CHECK(!adapter.merged, what, ": '", part, "' is merged into the base's weights, where no composition can ",
                "use it; unmerge it first");
    // The library drops out the Fuse's scores while it trains.
    TORCH_CHECK(!adapter.trainable || fusion_names(composition.tree).empty(), what, ": '", part, "' is trained, and '",
                composition.name, "', ", composition_to_string(composition.tree), ", has a Fuse, in which no adapter ",
                "can be trained yet; freeze it first (freeze_adapter)");
  }
  if (has_multi_task(composition.tree)) {
    check_task_adapters(composition, adapters, what);
  }
}

std::vector<int64_t> ids_of_tasks(const Composition& tree, const std::vector<std::string>& adapters,
                                  const std::vector<NamedComposition>& compositions, const std::string& what) {
  std::vector<int64_t> ids;
  for (const Composition& task : tasks_of(tree)) {
    if (task.kind == BlockKind::kAdapter) {
      const auto found = std::find(adapters.begin(), adapters.end(), task.name);
      TORCH_CHECK(found != adapters.end(), what, ": no adapter is called '", task.name, "'");
      ids.push_back(found - adapters.begin());
      continue;
    }
    const auto found = std::find_if(compositions.begin(), compositions.end(), [&](const NamedComposition& held) {
      return composition_to_json(held.tree) == composition_to_json(task);
    });
    TORCH_CHECK(found != compositions.end(), what, ": no composition is ", composition_to_string(task), ", which is a ",
                "task of ", composition_to_string(tree), "; remove that one first, or with it");
    ids.push_back(static_cast<int64_t>(adapters.size() + (found - compositions.begin())));
  }
  return ids;
}

std::vector<NamedComposition> read_compositions(const Module& adapters_module) {
  std::vector<NamedComposition> result;
  if (!adapters_module.hasattr("composition_names")) {
    return result;
  }
  const auto names = adapters_module.attr("composition_names").toListRef();
  const auto trees = adapters_module.attr("compositions").toListRef();
  TORCH_CHECK(names.size() == trees.size(), "expected as many compositions as their names, got ", trees.size(), " and ",
              names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    result.push_back({names[i].toStringRef(), composition_from_json(trees[i].toStringRef())});
  }
  return result;
}

std::set<std::string> splitting_compositions(const Module& adapters_module) {
  std::set<std::string> result;
  for (const NamedComposition& composition : read_compositions(adapters_module)) {
    if (splits_inputs(composition.tree)) {
      result.insert(composition.name);
    }
  }
  return result;
}

std::set<std::string> task_compositions(const Module& adapters_module) {
  std::set<std::string> result;
  for (const NamedComposition& composition : read_compositions(adapters_module)) {
    if (has_multi_task(composition.tree)) {
      result.insert(composition.name);
    }
  }
  return result;
}

std::vector<std::string> names_by_id(const Module& adapters_module) {
  std::vector<std::string> names;
  for (const char* list : {"names", "composition_names"}) {
    if (adapters_module.hasattr(list)) {
      for (const c10::IValue& name : adapters_module.attr(list).toListRef()) {
        names.push_back(name.toStringRef());
      }
    }
  }
  return names;
}

void register_compositions(Module& adapters_module, const std::vector<Adapter>& adapters,
                           const std::vector<NamedComposition>& compositions) {
  c10::List<std::string> names, trees, all_names, all_configs, keys;
  c10::List<int64_t> ids, heads;
  for (const Adapter& adapter : adapters) {
    heads.push_back(static_cast<int64_t>(heads.size()));
    all_names.push_back(adapter.name);
    all_configs.push_back(config_to_json(adapter.config));
  }
  for (size_t i = 0; i < compositions.size(); ++i) {
    const NamedComposition& composition = compositions[i];
    const std::string tree = composition_to_json(composition.tree);
    names.push_back(composition.name);
    trees.push_back(tree);
    all_names.push_back(composition.name);
    all_configs.push_back(tree);
    heads.push_back(composition.head ? static_cast<int64_t>(adapters.size() + i) : head_of(composition.tree, adapters));
    for (const std::string& part : adapters_in(composition.tree)) {
      keys.push_back(composition.name + "." + part);
      ids.push_back(static_cast<int64_t>(adapters.size() + i));
    }
  }
  const auto strings = c10::ListType::ofStrings();
  const auto integers = c10::ListType::ofInts();
  adapters_module.register_attribute("composition_names", strings, names);
  adapters_module.register_attribute("compositions", strings, trees);
  adapters_module.register_attribute("all_names", strings, all_names);
  adapters_module.register_attribute("all_configs", strings, all_configs);
  adapters_module.register_attribute("composed_keys", strings, keys);
  adapters_module.register_attribute("composed_ids", integers, ids);
  adapters_module.register_attribute("composed_heads", integers, heads);
  adapters_module.register_attribute("composed_gate_keys", integers, c10::List<int64_t>());
  adapters_module.register_attribute("composed_gate_layers", integers, c10::List<int64_t>());
  adapters_module.register_attribute("composed_gate_locations", strings, c10::List<std::string>());
}

void register_composition_parts(Module& adapters_module, const std::vector<NamedComposition>& compositions) {
  c10::List<c10::List<int64_t>> parts;
  for (const NamedComposition& composition : compositions) {
    parts.push_back(c10::List<int64_t>(std::vector<int64_t>(adapters_in(composition.tree).size(), 0)));
  }
  adapters_module.register_attribute(kCompositionParts, c10::ListType::create(c10::ListType::ofInts()), parts);
}

void set_composed_gates(Module& adapters_module, const std::vector<ComposedGate>& gates) {
  c10::List<std::string> locations;
  c10::List<int64_t> keys, layers;
  for (const ComposedGate& gate : gates) {
    keys.push_back(static_cast<int64_t>(gate.key));
    layers.push_back(gate.layer);
    locations.push_back(gate.location);
  }
  adapters_module.setattr("composed_gate_keys", keys);
  adapters_module.setattr("composed_gate_layers", layers);
  adapters_module.setattr("composed_gate_locations", locations);
}

}  // namespace torchgraft
