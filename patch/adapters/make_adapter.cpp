#include <torchgraft/patch/adapters/make_adapter.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/plan/head_weights.h>
#include <torchgraft/plan/library_layers.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/prefix_mlp.h>
#include <torchgraft/plan/reft_weights.h>
#include <torchgraft/plan/reparametrisation.h>
#include <torchgraft/registration/parse_json.h>

#include <algorithm>
#include <utility>
#include <variant>

namespace torchgraft {

void check_name(const std::string& name, const std::vector<Adapter>& taken) {
  // Keys of weights have the name between two dots. Control characters would break lines of errors and listings.
  const bool has_any = std::any_of(name.begin(), name.end(), [](unsigned char c) { return c == '.' || c < ' '; });
  constexpr size_t kLongest = 255;
  TORCH_CHECK(!name.empty() && !has_any && name.size() <= kLongest, "graft: '", shown_text(name),
              "' cannot be an adapter's name: use a text of at most ", kLongest,
              " bytes without dots and control characters");
  for (const Adapter& adapter : taken) {
    TORCH_CHECK(adapter.name != name, "graft: the module already has an adapter '", name, "'; choose another name");
  }
}

void check_can_train(const Adapter& adapter) {
  TORCH_CHECK(!adapter.merged, "graft: '", adapter.name,
              "' is merged into the base's weights and cannot be trained; unmerge it first");
  for (const auto& [source, weights] : adapter.sources) {
    for (const auto& [name, tensor] : weights) {
      TORCH_CHECK(is_trained_source(name) || tensor.element_size() >= 4, "graft: '", adapter.name,
                  "' has an orthogonal projection (ReFT), which torch cannot train in ", tensor.scalar_type(),
                  "; train it on the module in float32");
    }
  }
  for (const PlannedModule& module : adapter.plan) {
    const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
    TORCH_CHECK(!bottleneck || !bottleneck->config.phm_layer || has_phm_factors(module, adapter.sources), "graft: '",
                adapter.name,
                "' cannot be trained any more: the factors of Compacter's projections were dropped when it was frozen; "
                "load it from its directory as a trainable adapter");
    TORCH_CHECK(lora_factors(module) == LoRAFactors::kNone || has_lora_factors(module, adapter.sources), "graft: '",
                adapter.name,
                "' cannot be trained any more: the factors of its VeRA or MTL-LoRA were dropped when it was frozen; "
                "load it from its directory as a trainable adapter");
  }
}

void restore_reft_sources(Adapter& adapter) {
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const PlannedModule& module = adapter.plan[m];
    const auto* reft = std::get_if<PlannedReft>(&module.method);
    if (reft && reft->config.orthogonality && !has_reft_sources(module, adapter.sources)) {
      adapter.sources[reft_source(module)] = reft_sources_of(*reft, adapter.weights[m].at("projection"));
    }
  }
}

namespace {

template <typename Config>
std::vector<int64_t> named_layers(const Config& config) {
  return config.leave_out;
}

std::vector<int64_t> named_layers(const ReftConfig& config) {
  const auto* numbers = std::get_if<std::vector<int64_t>>(&config.layers);
  return numbers ? *numbers : std::vector<int64_t>();
}

std::vector<int64_t> named_layers(const PromptTuningConfig& /*config*/) { return {}; }

// A layer to leave out that the model lacks is a slip. In a trained adapter it is not: it was no layer there either.
void check_leave_out(const AdapterConfig& config, const Structure& structure) {
  for (const MethodConfig& method : config.methods) {
    for (const int64_t layer : std::visit([](const auto& held) { return named_layers(held); }, method)) {
      TORCH_CHECK(layer >= 0 && layer < structure.depth(),
                  "graft: ", std::holds_alternative<ReftConfig>(method) ? "layers" : "leave_out", " names layer ",
                  layer, "; the model has layers 0 to ", structure.depth() - 1);
    }
  }
}

}  // namespace

void check_prefix_heads(const AdapterSpec& spec, const Plan& plan) {
  for (const PlannedModule& module : plan) {
    const auto* prefix = std::get_if<PlannedPrefix>(&module.method);
    TORCH_CHECK(!prefix || !spec.prefix_heads || prefix->num_kv_heads == *spec.prefix_heads, "graft: '", spec.name,
                "' has prefixes for ", spec.prefix_heads.value_or(0), " heads of keys and values, ", module.location,
                " of layer ", module.number, " has ", prefix ? prefix->num_kv_heads : 0,
                ": the same numbers would be other keys; load it onto the model that it was trained on");
  }
}

void set_gate_pooling(AdapterSpec& spec, const std::string& wanted, const char* what) {
  if (wanted.empty()) {
    return;
  }
  check_gate_pooling(wanted, what);
  if (spec.weights && has_gates(spec.config) && spec.config.gate_pooling != wanted) {
    TORCH_WARN(what, ": '", spec.name, "' was trained with gates over ", spec.config.gate_pooling,
               " tokens; gate_pooling=\"", wanted, "\" changes its results wherever a batch has padding");
  }
  spec.config.gate_pooling = wanted;
}

namespace {

bool may_have_output(const Structure& structure) {
  return structure.has_output_embeddings || !structure.several_outputs.empty() || !structure.other_outputs.empty();
}

// Where an invertible adapter may lack its inverse. Afterwards the configuration says whether it has one.
void warn_of_output(Adapter& adapter, const Structure& structure) {
  const auto& methods = adapter.config.methods;
  const bool is_invertible = std::any_of(methods.begin(), methods.end(), [](const MethodConfig& method) {
    const auto* bottleneck = std::get_if<BnConfig>(&method);
    return bottleneck && bottleneck->inv_adapter;
  });
  const bool is_known = std::exchange(adapter.config.inverts_output_is_known, true);
  if (!is_invertible) {
    return;
  }
  if (!is_known && may_have_output(structure)) {
    TORCH_WARN("graft: the directory of '", adapter.name,
               "' does not say whether its inverse stood before the output embeddings when it was trained (its "
               "model_class has no head of the adapters library or of transformers). It is left out here, so that "
               "results differ if it stood there; add \"inverts_output\": true or false to its adapter_config.json");
  } else if (adapter.config.inverts_output && !structure.other_outputs.empty()) {
    TORCH_WARN("graft: '", adapter.name, "' has no inverse before output embeddings: as many outputs as the table of ",
               "the tokens has rows are found nowhere. Results differ from the adapters library's if ",
               structure.other_outputs, " is the model's output embeddings");
  }
}

// The adapters library computes relative positions over the keys with the prefix among them.
void check_positions(const Adapter& adapter, const Structure& structure) {
  for (const PlannedModule& module : adapter.plan) {
    const Layer& layer = structure.layers.at(structure.position(module.layer));
    const bool is_moved = adapter.config.may_move_positions && layer.has_relative_scores &&
                          std::holds_alternative<PlannedPrefix>(module.method);
    TORCH_CHECK(!is_moved, "graft: '", adapter.name, "' has prefixes that the adapters library trained, and layer ",
                layer.number, " adds a term of relative positions to its scores",
                layer.query && !layer.query->path.empty() ? " (of " + layer.query->path + ")" : "",
                ": the library gives prefixes positions there, too, and torchgraft does not, so that the trained "
                "adapter would give other results; train it anew here, or remove \"model_type\" from its "
                "adapter_config.json to accept the difference");
  }
}

}  // namespace

Adapter make_adapter(const AdapterSpec& spec, const Structure& structure, const at::TensorOptions& options) {
  check_supported(spec.config);
  Adapter adapter{spec.name, numbered_as_found(spec.config, structure)};
  if (!has_gates(adapter.config)) {
    adapter.config.gate_pooling = kAllTokens;
  }
  if (!spec.weights) {
    adapter.config.wired_for.clear();  // a fresh adapter is as defined
    adapter.config.may_move_positions = false;
    adapter.config.inverts_output = true;
    adapter.config.inverts_output_is_known = true;
    check_leave_out(adapter.config, structure);
  }
  warn_of_output(adapter, structure);
  adapter.plan = make_plan(structure, adapter.config);
  check_prefix_groups(adapter.plan);
  check_positions(adapter, structure);
  adapter.trainable = spec.trainable;
  if (spec.weights) {
    check_prefix_heads(spec, adapter.plan);
    adapter.weights = adapter_hub_weights(adapter.plan, structure, *spec.weights, spec.name_in_weights(), options,
                                          spec.trainable ? &adapter.sources : nullptr);
  } else {
    adapter.weights = init_weights(adapter.plan, options, spec.trainable ? &adapter.sources : nullptr);
  }
  TORCH_INTERNAL_ASSERT(adapter.weights.size() == adapter.plan.size(), "a plan of ", adapter.plan.size(),
                        " modules got weights for ", adapter.weights.size());
  if (spec.trainable) {
    check_can_train(adapter);
  }
  if (spec.head) {
    const int64_t hidden_size = structure.layers.back().hidden_size;
    adapter.head = Head{spec.head->config, head_weights(spec.head->config, hidden_size, spec.head->weights,
                                                        spec.head->saved_name, options)};
  }
  return adapter;
}

}  // namespace torchgraft
