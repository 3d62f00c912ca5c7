#include <torchgraft/patch/module/draft.h>

#include <torchgraft/patch/adapters/dora.h>
#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/fuse_projections.h>
#include <torchgraft/patch/insert/use_eager_autograd.h>
#include <torchgraft/patch/insert/verify.h>
#include <torchgraft/patch/module/heads_module.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/sites/apply_sites.h>
#include <torchgraft/registration/library.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Value;

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
  const bool was_fused = !adapters.hasattr("fused") || adapters.attr("fused").toBool();  // older files do not say
  options.fuse = options.fuse && was_fused;
  const auto sites = remembered_sites(grafted);
  TORCH_CHECK(!options.sites || (sites && to_json(*sites) == to_json(*options.sites)),
              "graft: the module was grafted with ", sites ? "other" : "detected",
              " sites, which all its adapters share; graft the base anew to change them");
  options.sites = sites;
  return options;
}

// What the token mask of heads is called where nobody says otherwise: forward returns a decoder's states where there is
// one.
const char* usual_head_mask(const Structure& structure) {
  const bool has_decoder = std::any_of(structure.layers.begin(), structure.layers.end(),
                                       [](const Layer& layer) { return layer.kind == AttentionKind::kCross; });
  return has_decoder ? "decoder_attention_mask" : "attention_mask";
}

bool has_tensor_argument(const Module& module, const std::string& name) {
  const auto& arguments = module.get_method("forward").function().getSchema().arguments();
  return std::any_of(arguments.begin() + 1, arguments.end(), [&](const c10::Argument& argument) {
    return argument.name() == name && argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor());
  });
}

// A module that is trained learns adapters only.
void freeze_base(const Module& module) {
  for (const at::Tensor& parameter : module.parameters()) {
    parameter.set_requires_grad(false);
  }
}

}  // namespace

std::string head_mask(const Foundation& foundation, const std::string& wanted) {
  if (wanted.empty()) {
    return foundation.head_mask;
  }
  TORCH_CHECK(has_tensor_argument(foundation.module, wanted), "add_head: forward has no Tensor argument '", wanted,
              "' for the token mask");
  const auto& adapters = foundation.adapters;
  const auto heads =
      std::count_if(adapters.begin(), adapters.end(), [](const Adapter& a) { return a.head.has_value(); });
  TORCH_CHECK(heads <= 1 || wanted == foundation.head_mask, "add_head: the token mask of the module's heads is '",
              foundation.head_mask, "'; all heads share it, got '", wanted, "'");
  return wanted;
}

GraphSites places(const CanonicalGraph& canonical, const Module& module, const std::optional<Structure>& wanted) {
  const GraphSites detected = find_sites(canonical, module);
  return wanted ? apply_sites(detected, *wanted, canonical, module) : detected;
}

std::optional<Structure> remembered_sites(const Module& grafted) {
  const std::string& json = grafted.attr("adapters").toModule().attr("sites").toStringRef();
  return json.empty() ? std::nullopt : std::optional(structure_from_json(json));
}

std::string active_name(const Module& grafted) {
  const c10::IValue active = grafted.get_method("active_adapter")({});
  return active.isNone() ? "" : active.toStringRef();
}

Foundation lay_foundation(const Module& module, const GraftOptions& given) {
  link_anchor();
  const bool regraft = is_grafted(module);
  TORCH_CHECK(regraft || !module.hasattr("adapters"),
              "graft: the module has an attribute 'adapters' of its own; rename it before scripting");
  Foundation result;
  result.options = regraft ? options_like(module, given) : given;
  result.module = base_copy(module);
  raise_mkldnn_convolution(result.module.get_method("forward").graph());  // base_forward must be one that can be saved
  inline_module_arguments(result.module);
  result.inserting = insert_options(result.options, result.module);
  result.canonical = canonicalise(result.module, "forward");
  result.sites = places(result.canonical, result.module, result.options.sites);
  check_found(result.sites.structure);
  result.weights = weight_options(result.sites, result.module);
  const std::string mask = usual_head_mask(result.sites.structure);
  result.head_mask = has_tensor_argument(result.module, mask) ? mask : "";
  if (regraft) {
    const Module adapters = module.attr("adapters").toModule();
    result.adapters = read_adapters(adapters, result.sites.structure);
    read_heads(adapters, result.adapters);
    if (adapters.hasattr("heads")) {
      result.head_mask = adapters.attr("head_mask").toStringRef();
    }
  }
  return result;
}

void check_grafted(const Module& module, const char* what) {
  TORCH_CHECK(is_grafted(module), what, ": the module has no adapters; graft some first");
}

Foundation open_grafted(const Module& module, const char* what) {
  check_grafted(module, what);
  return lay_foundation(module, {});
}

Module base_copy(const Module& module) {
  Module result = clone_module(module);
  if (is_grafted(module)) {
    remove_methods(result);
  }
  return result;
}

Module build(Foundation foundation, const std::string& active) {
  if (!active.empty()) {
    find_adapter(foundation.adapters, active, "activate");
  }
  Module& result = foundation.module;
  for (Adapter& adapter : foundation.adapters) {
    complete_dora(adapter, foundation.sites, result);
  }
  const bool trains = std::any_of(foundation.adapters.begin(), foundation.adapters.end(),
                                  [](const Adapter& adapter) { return adapter.trainable; });
  if (trains) {
    freeze_base(result);
  }
  const std::vector<BankSlot> slots = stack_banks(foundation.adapters);
  const std::vector<SlotRun> runs = slot_runs(slots, foundation.sites.structure);
  Module bank = make_adapters_module(foundation.adapters, slots, runs, result._ivalue()->compilation_unit());
  const GraftOptions& options = foundation.options;
  bank.register_attribute("gate_pooling", c10::StringType::get(), options.gate_pooling);
  bank.register_attribute("token_mask_input", c10::StringType::get(), options.token_mask_input);
  bank.register_attribute("sites", c10::StringType::get(), options.sites ? to_json(*options.sites) : "");
  bank.register_attribute("fused", c10::BoolType::get(), options.fuse);
  bank.register_attribute("head_mask", c10::StringType::get(), foundation.head_mask);
  add_heads(bank, foundation.adapters, result._ivalue()->compilation_unit());
  result.register_module("adapters", bank);
  const size_t ops =
      insert_adapters(foundation.canonical.graph, foundation.sites, slots, runs, result, foundation.inserting);
  if (options.fuse) {
    fuse_projections(foundation.canonical.graph);
  }
  if (trains) {
    use_eager_autograd(foundation.canonical.graph);
  }
  add_methods(result, foundation.canonical.graph, {foundation.head_mask, foundation.sites.result_is_sequence_first});
  if (!active.empty()) {
    bank.get_method("activate")({active});
  }
  bank.train(result.is_training());
  if (options.verify) {
    verify_grafted(result, ops);
  }
  return result;
}

}  // namespace torchgraft
