#include <torchgraft/patch/graft.h>

#include <torchgraft/patch/adapter_bank.h>
#include <torchgraft/patch/canonicalise.h>
#include <torchgraft/patch/find_sites.h>
#include <torchgraft/patch/graph_utils.h>
#include <torchgraft/patch/insert.h>
#include <torchgraft/patch/methods.h>
#include <torchgraft/patch/verify.h>
#include <torchgraft/registration/library.h>

#include <algorithm>
#include <cctype>

namespace torchgraft {
namespace {

using torch::jit::Module;

void check_name(const std::string& name, const std::vector<Adapter>& taken) {
  const bool identifier =
      !name.empty() && !std::isdigit(static_cast<unsigned char>(name[0])) &&
      std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; });
  TORCH_CHECK(identifier, "graft: '", name,
              "' cannot be an adapter's name: use letters, digits and underscores, with no ", "digit first");
  for (const Adapter& adapter : taken) {
    TORCH_CHECK(adapter.name != name, "graft: the module already has an adapter '", name, "'; choose another name");
  }
}

std::string join(const std::vector<std::string>& lines) {
  std::string result;
  for (const std::string& line : lines) {
    result += "\n  " + line;
  }
  return result;
}

void check_found(const Structure& structure) {
  TORCH_CHECK(!structure.layers.empty(), "graft: no attention was found in the module's forward",
              structure.near_misses.empty() ? "; is it a Transformer?" : "; near misses:", join(structure.near_misses));
}

// Options of the weights: those of the model's first query projection.
at::TensorOptions weight_options(const GraphSites& sites, const Module& module) {
  const at::Tensor weight = resolve_tensor(sites.layers.front().query.node->input(1), module);
  return at::TensorOptions().dtype(weight.scalar_type()).device(weight.device());
}

InsertOptions insert_options(const GraftOptions& options, const Module& module) {
  TORCH_CHECK(options.gate_pooling == "all" || options.gate_pooling == "unpadded",
              "graft: expected gate_pooling \"all\" or \"unpadded\", got \"", options.gate_pooling, "\"");
  InsertOptions result;
  result.pool_unpadded = options.gate_pooling == "unpadded";
  if (options.token_mask_input.empty()) {
    return result;
  }
  TORCH_CHECK(result.pool_unpadded, "graft: a token mask is used with gate_pooling \"unpadded\" only");
  std::string names;
  const auto& arguments = module.get_method("forward").function().getSchema().arguments();
  for (size_t i = 1; i < arguments.size(); ++i) {
    names += (names.empty() ? "" : ", ") + arguments[i].name();
    if (arguments[i].name() != options.token_mask_input) {
      continue;
    }
    TORCH_CHECK(arguments[i].type()->isSubtypeOf(*c10::TensorType::get()), "graft: the token mask input '",
                options.token_mask_input, "' must be a Tensor, it is ", arguments[i].type()->repr_str());
    result.token_mask_input = i;
  }
  TORCH_CHECK(result.token_mask_input, "graft: forward has no argument '", options.token_mask_input,
              "'; it has: ", names);
  return result;
}

// `options` for a module that is grafted already: its gates stay pooled as they are.
GraftOptions options_like(const Module& grafted, GraftOptions options) {
  const Module adapters = grafted.attr("adapters").toModule();
  const std::string pooling = adapters.attr("gate_pooling").toStringRef();
  const std::string mask = adapters.attr("token_mask_input").toStringRef();
  TORCH_CHECK(options.gate_pooling == "all" || options.gate_pooling == pooling,
              "graft: the module's gates are pooled over \"", pooling, "\" tokens; all its adapters share that");
  TORCH_CHECK(options.token_mask_input.empty() || options.token_mask_input == mask,
              "graft: the module's token mask is '", mask, "'; all its adapters share that");
  options.gate_pooling = pooling;
  options.token_mask_input = mask;
  return options;
}

Adapter make_adapter(const AdapterSpec& spec, const Structure& structure, const at::TensorOptions& options) {
  check_supported(spec.config);
  Adapter adapter{spec.name, spec.config};
  adapter.plan = make_plan(structure, spec.config);
  if (spec.weights) {
    const std::string saved_name = spec.saved_name.empty() ? spec.name : spec.saved_name;
    adapter.weights = adapter_hub_weights(adapter.plan, structure, *spec.weights, saved_name, options);
  } else {
    adapter.weights = init_weights(adapter.plan, options);
  }
  TORCH_INTERNAL_ASSERT(adapter.weights.size() == adapter.plan.size());
  return adapter;
}

std::vector<Adapter> existing_adapters(const Module& grafted, const Structure& structure) {
  return read_adapters(grafted.attr("adapters").toModule(), structure);
}

}  // namespace

Module graft(const Module& module, const std::vector<AdapterSpec>& specs, const GraftOptions& given) {
  TORCH_CHECK(!specs.empty(), "graft: no adapter was given");
  link_anchor();
  const bool regraft = is_grafted(module);
  TORCH_CHECK(regraft || !module.hasattr("adapters"),
              "graft: the module has an attribute 'adapters' of its own; rename it before scripting");
  const GraftOptions options = regraft ? options_like(module, given) : given;

  // 1. clone   2. canonicalise   3. find sites
  Module result = module.clone();
  if (regraft) {
    remove_methods(result);
  }
  const InsertOptions inserting = insert_options(options, result);
  const CanonicalGraph canonical = canonicalise(result, "forward");
  const GraphSites sites = find_sites(canonical, result);
  check_found(sites.structure);

  // 4. plan
  std::vector<Adapter> adapters;
  if (regraft) {
    adapters = existing_adapters(module, sites.structure);
  }
  const at::TensorOptions weights = weight_options(sites, result);
  for (const AdapterSpec& spec : specs) {
    check_name(spec.name, adapters);
    adapters.push_back(make_adapter(spec, sites.structure, weights));
  }
  const std::vector<BankSlot> slots = stack_banks(adapters);

  // 5. insert
  Module bank = make_adapters_module(adapters, slots, result._ivalue()->compilation_unit());
  bank.register_attribute("gate_pooling", c10::StringType::get(), options.gate_pooling);
  bank.register_attribute("token_mask_input", c10::StringType::get(), options.token_mask_input);
  result.register_module("adapters", bank);
  insert_adapters(canonical.graph, sites, slots, result, inserting);
  add_methods(result, canonical.graph);
  bank.get_method("activate")({options.active.empty() ? specs.back().name : options.active});
  bank.train(module.is_training());

  // 6. verify
  if (options.verify) {
    verify_grafted(result, slots);
  }
  return result;
}

Structure inspect(const Module& module) {
  const CanonicalGraph canonical = canonicalise(module, is_grafted(module) ? "base_forward" : "forward");
  return find_sites(canonical, module).structure;
}

}  // namespace torchgraft
