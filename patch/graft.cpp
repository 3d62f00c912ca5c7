#include <torchgraft/patch/graft.h>

#include <torchgraft/patch/adapter_bank.h>
#include <torchgraft/patch/apply_sites.h>
#include <torchgraft/patch/canonicalise.h>
#include <torchgraft/patch/clone_module.h>
#include <torchgraft/patch/find_sites.h>
#include <torchgraft/patch/graph_utils.h>
#include <torchgraft/patch/insert.h>
#include <torchgraft/patch/methods.h>
#include <torchgraft/patch/passes/lower_mkldnn.h>
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
  const at::Tensor weight = weight_source(sites.layers.front().query.node->input(1), module).tensor;
  TORCH_CHECK(weight.defined(), "graft: the weight of the first attention's query projection is computed at run time; ",
              "its dtype and device are not known");
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

GraphSites places(const CanonicalGraph& canonical, const Module& module, const std::optional<Structure>& wanted) {
  const GraphSites detected = find_sites(canonical, module);
  return wanted ? apply_sites(detected, *wanted, canonical, module) : detected;
}

// The sites that a grafted module was made with; nullopt when they were detected.
std::optional<Structure> remembered_sites(const Module& grafted) {
  const std::string& json = grafted.attr("adapters").toModule().attr("sites").toStringRef();
  return json.empty() ? std::nullopt : std::optional(structure_from_json(json));
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
  const auto sites = remembered_sites(grafted);
  TORCH_CHECK(!options.sites || (sites && to_json(*sites) == to_json(*options.sites)),
              "graft: the module was grafted with ", sites ? "other" : "detected",
              " sites, which all its adapters share; graft the base anew to change them");
  options.sites = sites;
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
  Module result = clone_module(module);
  if (regraft) {
    remove_methods(result);
  }
  lower_mkldnn(result.get_method("forward").graph());  // base_forward must be one that can be saved
  inline_module_arguments(result);
  const InsertOptions inserting = insert_options(options, result);
  const CanonicalGraph canonical = canonicalise(result, "forward");
  const GraphSites sites = places(canonical, result, options.sites);
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
  const std::vector<SlotRun> runs = slot_runs(slots, sites.structure);
  Module bank = make_adapters_module(adapters, slots, runs, result._ivalue()->compilation_unit());
  bank.register_attribute("gate_pooling", c10::StringType::get(), options.gate_pooling);
  bank.register_attribute("token_mask_input", c10::StringType::get(), options.token_mask_input);
  bank.register_attribute("sites", c10::StringType::get(), options.sites ? to_json(*options.sites) : "");
  result.register_module("adapters", bank);
  const size_t ops = insert_adapters(canonical.graph, sites, slots, runs, result, inserting);
  add_methods(result, canonical.graph);
  bank.get_method("activate")({options.active.empty() ? specs.back().name : options.active});
  bank.train(module.is_training());

  // 6. verify
  if (options.verify) {
    verify_grafted(result, ops);
  }
  return result;
}

Structure inspect(const Module& module, const std::optional<Structure>& sites) {
  const bool grafted = is_grafted(module);
  const CanonicalGraph canonical = canonicalise(module, grafted ? "base_forward" : "forward");
  return places(canonical, module, grafted && !sites ? remembered_sites(module) : sites).structure;
}

}  // namespace torchgraft
