#include <torchgraft/patch/module/draft.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/dora.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/adapters/parallel_rows.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/canonicalise/decompose_optimized.h>
#include <torchgraft/patch/canonicalise/inline_module_arguments.h>
#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/dump_graph.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/addmm_form.h>
#include <torchgraft/patch/insert/fuse_projections.h>
#include <torchgraft/patch/insert/guard_attributes.h>
#include <torchgraft/patch/insert/use_eager_autograd.h>
#include <torchgraft/patch/insert/verify.h>
#include <torchgraft/patch/module/example_inputs.h>
#include <torchgraft/patch/module/graft_options.h>
#include <torchgraft/patch/module/heads_module.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/place_dtypes.h>
#include <torchgraft/patch/module/rename_names.h>
#include <torchgraft/patch/module/trial_run.h>
#include <torchgraft/patch/sites/apply_sites.h>
#include <torchgraft/patch/sites/check_autocast.h>
#include <torchgraft/patch/sites/row_order.h>
#include <torchgraft/registration/library.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Module;

void check_found(const Structure& structure) {
  TORCH_CHECK(
      !structure.layers.empty(), "graft: no attention was found in the module's forward",
      structure.near_misses.empty() ? "; is it a Transformer?" : "; near misses:", indented(structure.near_misses));
}

// The dtype and device of adapter weights: those of the model's first query projection. A packed one, on the CPU, reads
// and gives float32.
at::TensorOptions weight_options(const GraphSites& sites, const Module& module) {
  const WeightSource source = weight_source(linear_weight(sites.layers.front().query.node), module);
  const at::Tensor& weight = source.tensor;
  if (source.packed) {
    return at::TensorOptions().dtype(at::kFloat).device(at::kCPU);
  }
  TORCH_CHECK(weight.defined(), "graft: the weight of the first attention's query projection is computed at run time; ",
              "its dtype and device are not known");
  return at::TensorOptions().dtype(weight.scalar_type()).device(weight.device());
}

// The default name of the heads' token mask. A model with a decoder returns the decoder's states.
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

// A backward pass would end at the first packed weight, or quantised number, that it meets.
void check_has_gradients(const std::shared_ptr<torch::jit::Graph>& graph) {
  for_each_node(graph->block(), [](const torch::jit::Node* node) {
    TORCH_CHECK(!is_packed_linear(node) && !is_unread_quantized(node),
                "graft: no adapter can be trained on a base with packed int8 or float16 ", "weights: ", described(node),
                " has no gradient; train on the base in float32, save the adapter, and ",
                "graft it onto this base from its directory");
  });
}

bool is_trainable(const std::vector<AdapterFusion>& fusions, const std::string& name) {
  return std::any_of(fusions.begin(), fusions.end(),
                     [&](const AdapterFusion& held) { return held.name() == name && held.trainable; });
}

// Training changes adapters only.
void freeze_base(const Module& module) {
  for (const at::Tensor& parameter : module.parameters()) {
    parameter.set_requires_grad(false);
  }
}

// Adds the submodule `adapters` to the draft's module: banks, heads, and the options of the graft.
Module add_adapters_module(Draft& draft, const std::vector<Slot>& slots, const std::vector<SlotRun>& runs) {
  const auto unit = draft.module._ivalue()->compilation_unit();
  Module adapters = make_adapters_module(draft.adapters, slots, runs, unit, draft.compositions);
  const GraftOptions& options = draft.options;
  adapters.register_attribute("token_mask_input", c10::StringType::get(), options.token_mask_input);
  adapters.register_attribute("sites", c10::StringType::get(), options.sites ? to_json(*options.sites) : "");
  adapters.register_attribute("fused", c10::BoolType::get(), options.fuse);
  adapters.register_attribute("allow_partial", c10::BoolType::get(), options.allow_partial);
  if (gate_poolings(draft.adapters).is_mixed()) {
    adapters.register_buffer(kPoolsAll, pools_all(draft.adapters).to(draft.weights.device()));
  }
  remember_names(adapters, options.rename);
  adapters.register_attribute("head_mask", c10::StringType::get(), draft.head_mask);
  const auto trains = [&](const std::string& name) { return is_trainable(draft.fusions, name); };
  add_heads(adapters, head_owners(draft.adapters, draft.compositions, trains), unit);
  register_fusions(adapters, draft.fusions, unit);
  if (draft.inserting.pool_rows && !draft.compositions.empty()) {
    register_composition_parts(adapters, draft.compositions);
  }
  adapters.train(draft.module.attr("training", c10::IValue(false)).toBool());  // a frozen module has no such attribute
  draft.module.register_module("adapters", adapters);
  return adapters;
}

void check_can_be_grafted(const Module& base, const NewNames& names) {
  TORCH_CHECK(!(base.hasattr("adapters") || base.find_method("adapters")) || names.count("adapters"),
              "graft: the module has an attribute 'adapters' of its own, which grafting adds", name_remedy("adapters"));
  for (const auto& argument : base.get_method("forward").function().getSchema().arguments()) {
    TORCH_CHECK(argument.name() != "adapter_ids" || names.count("adapter_ids"),
                "graft: forward has an argument 'adapter_ids' of its own, which grafting adds",
                name_remedy("adapter_ids"));
  }
  for (const auto& [path, submodule] : base.named_modules()) {
    TORCH_CHECK(!is_grafted(submodule), "graft: the submodule ", path,
                " has adapters; graft onto the submodule, or call torchgraft.ungraft() on it first");
  }
  check_no_hooks(base, "graft");
}

// With one adapter for all rows their order is of no importance: who grafts without verifying may have that.
void check_rows(const Draft& draft) {
  try {
    check_row_order(draft.sites, draft.module);
  } catch (const c10::Error& error) {
    TORCH_CHECK(!draft.options.verify, error.what_without_backtrace(),
                "; verify=False (C++: GraftOptions::verify = false) grafts adapters that all rows use together");
    TORCH_WARN(error.what_without_backtrace());
  }
}

}  // namespace

std::string indented(const std::vector<std::string>& lines) {
  std::string result;
  for (const std::string& line : lines) {
    result += "\n  " + line;
  }
  return result;
}

std::string head_mask(const Draft& draft, const std::string& wanted) {
  if (wanted.empty()) {
    return draft.head_mask;
  }
  TORCH_CHECK(has_tensor_argument(draft.module, wanted), "add_head: forward has no Tensor argument '", wanted,
              "' for the token mask; name one of its arguments");
  const auto& adapters = draft.adapters;
  const auto has_head = [](const auto& owner) { return owner.head.has_value(); };
  const auto heads = std::count_if(adapters.begin(), adapters.end(), has_head) +
                     std::count_if(draft.compositions.begin(), draft.compositions.end(), has_head);
  TORCH_CHECK(heads <= 1 || wanted == draft.head_mask, "add_head: expected the token mask '", draft.head_mask,
              "', which all heads of the module share, got '", wanted, "'");
  return wanted;
}

Draft open_draft(const Module& module, const GraftOptions& given) {
  link_anchor();
  const bool regraft = is_grafted(module);
  if (!regraft) {
    check_can_be_grafted(module, given.rename);
  }
  Draft result;
  result.options = regraft ? options_like(module, given) : given;
  result.module = base_copy(module);
  rename_names(result.module, result.options.rename);
  raise_mkldnn_convolution(result.module.get_method("forward").graph());  // torch could not save base_forward otherwise
  inline_module_arguments(result.module);
  result.inserting = insert_options(result.options, result.module);
  result.canonical = canonicalise(result.module, "forward");
  result.sites = choose_sites(result.canonical, result.module, result.options.sites);
  check_found(result.sites.structure);
  result.weights = weight_options(result.sites, result.module);
  if (!regraft) {
    check_rows(result);
    check_autocast(result.sites, *result.canonical.graph, result.weights.device());
  }
  const std::string mask = usual_head_mask(result.sites.structure);
  result.head_mask = has_tensor_argument(result.module, mask) ? mask : "";
  if (regraft) {
    const Module adapters = module.attr("adapters").toModule();
    result.adapters = read_adapters(adapters, result.sites.structure);
    read_heads(adapters, result.adapters);
    result.compositions = read_compositions(adapters);
    read_heads(adapters, result.adapters.size(), result.compositions);
    result.fusions = read_fusions(adapters);
    if (adapters.hasattr("heads")) {
      result.head_mask = adapters.attr("head_mask").toStringRef();
    }
  }
  return result;
}

void check_free_name(const Draft& draft, const std::string& name) {
  check_name(name, draft.adapters);
  for (const NamedComposition& composition : draft.compositions) {
    TORCH_CHECK(composition.name != name, "graft: the module already has a composition '", name,
                "'; choose another name");
  }
}

size_t find_plain(const Draft& draft, const std::string& name, const char* what) {
  for (const NamedComposition& composition : draft.compositions) {
    TORCH_CHECK(composition.name != name, what, ": '", name, "' is a composition, ",
                composition_to_string(composition.tree), ", which has no weights of its own; name one of its adapters");
  }
  return find_adapter(draft.adapters, name, what);
}

Draft open_grafted(const Module& module, const char* what) {
  check_grafted(module, what);
  return open_draft(module, {});
}

Module base_copy(const Module& module) {
  Module result = clone_module(module);
  if (is_grafted(module)) {
    const NewNames names = remembered_names(result);
    remove_methods(result);
    rename_names(result, reversed(names));
  }
  for_each_method(
      result, [](const std::string&, const std::shared_ptr<torch::jit::Graph>& graph) { decompose_optimized(graph); });
  return result;
}

namespace {

// Arguments of forward that may be run to find out where rows of a Parallel can be repeated.
std::vector<Arguments> row_examples(const Draft& draft) {
  bool trains = false;
  for (const Module& module : draft.module.modules()) {
    const bool has_state = module.hasattr("training") && module.attr("training").isBool();
    trains = trains || (has_state && module.attr("training").toBool());
  }
  if (!has_parallel(draft.compositions) || trains ||
      !reason_not_to_run(graph_of_run(draft.module, "forward")).empty()) {
    return {};
  }
  const auto forward = draft.module.get_method("forward");
  std::vector<Arguments> given;
  if (draft.example) {
    given.push_back(*draft.example);
  } else {
    const ExampleInputs made = make_example_inputs(forward.function().getSchema(), *forward.graph(),
                                                   *draft.canonical.graph, draft.module, draft.weights);
    for (const ExampleInputs::Candidate& candidate : made.candidates) {
      given.push_back(candidate.arguments);
    }
  }
  const auto& declared = forward.function().getSchema().arguments();
  std::vector<Arguments> result;
  for (Arguments& arguments : given) {
    while (arguments.size() + 1 < declared.size() && declared[arguments.size() + 1].default_value()) {
      arguments.push_back(*declared[arguments.size() + 1].default_value());
    }
    if (arguments.size() + 1 == declared.size()) {
      result.push_back(arguments);
    }
  }
  return result;
}

}  // namespace

Module build(Draft draft, const std::string& active) {
  Module& result = draft.module;
  const auto& graph = draft.canonical.graph;
  cast_to_places(draft.adapters, draft.sites, result);
  for (Adapter& adapter : draft.adapters) {
    complete_dora(adapter, draft.sites, result);
  }
  const auto is_trained = [](const auto& held) { return held.trainable; };
  const bool trains = std::any_of(draft.adapters.begin(), draft.adapters.end(), is_trained) ||
                      std::any_of(draft.fusions.begin(), draft.fusions.end(), is_trained);
  if (trains) {
    check_has_gradients(graph);
    freeze_base(result);
  }
  const std::vector<Slot> slots = stack_banks(draft.adapters);
  const std::vector<SlotRun> runs = slot_runs(slots, draft.sites.structure);
  const Module bank = add_adapters_module(draft, slots, runs);
  if (!active.empty()) {
    find_id(bank, active, "activate");
  }
  draft.inserting.compositions = draft.compositions;
  draft.inserting.fusions = draft.fusions;
  draft.inserting.adapters = &draft.adapters;
  draft.inserting.poolings = gate_poolings(draft.adapters);
  draft.inserting.examples = row_examples(draft);
  GraphDump dump("insert");
  const size_t ops = insert_adapters(graph, draft.sites, slots, runs, result, draft.inserting);
  dump("insert_adapters", *graph);
  if (draft.options.fuse) {
    fuse_projections(graph);
    dump("fuse_projections", *graph);
  }
  write_addmm_form(graph, result);
  dump("write_addmm_form", *graph);
  if (trains) {
    use_eager_autograd(graph);
    dump("use_eager_autograd", *graph);
  }
  guard_attributes(graph, draft.canonical.folded);
  dump("guard_attributes", *graph);
  // No head beside a prompt reads the mask, which does not tell of the prompt's tokens.
  const bool has_prompt = std::any_of(slots.begin(), slots.end(), is_prompt);
  add_methods(result, graph, {has_prompt ? "" : draft.head_mask, draft.sites.result_is_sequence_first});
  if (!active.empty()) {
    bank.get_method("activate")({active});
  }
  verify_grafted(result, ops);
  return result;
}

}  // namespace torchgraft
