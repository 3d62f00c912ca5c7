#include <torchgraft/patch/pool/pool_shape.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/plan/saved_config.h>

#include <map>
#include <utility>

namespace torchgraft {
namespace {

// `config` with the defaults of all fields that act on the sizes of a bank's row, on numbers in it, or on training.
AdapterConfig without_sizes(AdapterConfig config) {
  for (MethodConfig& method : config.methods) {
    if (auto* bottleneck = std::get_if<BnConfig>(&method)) {
      bottleneck->reduction_factor = BnConfig{}.reduction_factor;
      bottleneck->init_weights = BnConfig{}.init_weights;
      bottleneck->init_weights_seed.reset();
      bottleneck->dropout = 0.0;
    } else if (auto* lora = std::get_if<LoRAConfig>(&method)) {
      lora->r = LoRAConfig{}.r;
      lora->alpha = LoRAConfig{}.alpha;
      lora->init_weights_seed.reset();
      lora->dropout = 0.0;
    } else if (auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
      prefix->bottleneck_size = PrefixTuningConfig{}.bottleneck_size;
      prefix->init_weights_seed.reset();
      prefix->dropout = 0.0;
    }
  }
  return config;
}

}  // namespace

std::string form_of(const Adapter& adapter) {
  std::string form = config_to_json(without_sizes(ejected_config(adapter.config)));
  for (const PlannedModule& module : adapter.plan) {
    form += ' ' + std::to_string(module.number) + '.' + slot_name(module);
  }
  return form;
}

std::string shape_tree(const Composition& tree) {
  const std::vector<std::string> names = adapters_in(tree);
  Composition result = tree;
  // In two steps: an adapter may be called like the number of another.
  for (const char* end : {"/", ""}) {
    for (size_t i = 0; i < names.size(); ++i) {
      const std::string number = std::to_string(i);
      result = *end ? with_renamed(result, names[i], "new/" + number + end)
                    : with_renamed(result, "new/" + number + "/", number);
    }
  }
  return composition_to_string(result);
}

void add_shapes(const std::vector<PoolShape>& shapes, std::vector<Adapter>& adapters,
                std::vector<NamedComposition>& compositions,
                const std::function<Adapter(const std::string& name, const AdapterConfig& config)>& make) {
  std::map<std::string, std::vector<std::string>> made;  // form -> names of adapters that have it
  for (const PoolShape& shape : shapes) {
    Composition tree = composition_from_string(shape.tree);
    std::map<std::string, size_t> used;  // how many of them this shape has
    for (size_t i = 0; i < shape.parts.size(); ++i) {
      std::vector<std::string>& names = made[shape.forms[i]];
      const size_t number = used[shape.forms[i]]++;
      if (number == names.size()) {
        names.push_back("part_" + std::to_string(adapters.size()));
        adapters.push_back(make(names.back(), shape.parts[i]));
        TORCH_INTERNAL_ASSERT(form_of(adapters.back()) == shape.forms[i],
                              "a shape's adapter has another form: ", form_of(adapters.back()), " and ",
                              shape.forms[i]);
      }
      tree = with_renamed(std::move(tree), std::to_string(i), names[number]);
    }
    compositions.push_back({shape.tree, std::move(tree)});  // errors of a run name it
  }
}

}  // namespace torchgraft
