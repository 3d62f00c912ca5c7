#include <torchgraft/patch/life.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/adapters/mean_adapter.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/loaded_again.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/whole_graphs.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/decompose_adapters.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/drawn_weights.h>
#include <torchgraft/patch/module/heads_module.h>
#include <torchgraft/patch/module/merge.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/place_dtypes.h>
#include <torchgraft/patch/module/verify_change.h>
#include <torchgraft/patch/module/verify_results.h>
#include <torchgraft/plan/reparametrisation.h>
#include <torchgraft/plan/saved_config.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <set>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Module;

// The configuration as JSON, without fields that only say how weights are initialised, and without a prefix's MLP.
std::string without_init(const AdapterConfig& config) {
  AdapterConfig copy = ejected_config(config);
  for (MethodConfig& method : copy.methods) {
    if (auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
      prefix->bottleneck_size = 0;
      prefix->non_linearity.clear();
    }
    std::visit(
        [](auto& held) {
          held.init_weights_seed.reset();
          if constexpr (requires { held.init_weights; }) {
            held.init_weights.clear();
          }
          if constexpr (requires { held.vera_d; }) {  // what they start from
            held.vera_d = held.vera_d ? std::optional(0.0) : std::nullopt;
            held.vera_b = held.vera_b ? std::optional(0.0) : std::nullopt;
          }
        },
        method);
  }
  return config_to_json(copy);
}

const VerifyOptions kUnverified = {/*verify=*/false};

// The result of each adapter of both modules, and of the base, must be what it was.
std::vector<SameResult> all_as_before(const Module& before, const Module& after) {
  std::vector<SameResult> pairs = {{{before, "base_forward"}, {after, "base_forward"}, "the base"}};
  for (const AdapterInfo& info : list_adapters(before)) {
    pairs.push_back({{before, "forward", info.name}, {after, "forward", info.name}, "'" + info.name + "'"});
  }
  return pairs;
}

void warn_of(const std::string& reason, const char* what) {
  if (!reason.empty()) {
    TORCH_WARN(what, ": ", reason, ". verify=False does without");
  }
}

// A change of a module, which verifies nothing, and what must be equal before and after it.
struct Change {
  const char* what;
  std::function<Module(const Module&)> make;
  std::function<std::vector<SameResult>(const Module& before, const Module& after)> pairs = all_as_before;
};

// Compares a module before and after the change that gave `result`; also each adapter of the result with itself, run in
// other ways, and rows of the base with base_forward. Where fresh adapters would hide a difference, since they change
// nothing, the change is made once more of a copy with drawn weights, and compared as well.
void verify_pairs(const Module& module, const Module& result, const Change& change, const VerifyOptions& verifying,
                  const at::TensorOptions& weights) {
  const Verifier verifier = verifier_of_change(change.what);
  std::string reason = verify_change(module, change.pairs(module, result), verifying.example, verifier);
  std::optional<BaseAndGrafted> drawn;
  if (const DrawnCopy before = with_drawn_weights(module); before.has_drawn) {
    const Module after = change.make(before.module);
    const std::string of_drawn =
        verify_change(module, change.pairs(before.module, after), verifying.example, verifier, /*is_drawn=*/true);
    reason = reason.empty() ? of_drawn : reason;
    drawn = {base_copy(after), with_drawn_weights(after).module};
  }
  const std::string rows = verify_results({base_copy(result), result}, drawn, verifying.example, weights,
                                          adapter_names(result.attr("adapters").toModule()), verifier);
  warn_of(reason.empty() ? rows : reason, change.what);
}

}  // namespace

Module remove_adapters(const Module& module, const std::vector<std::string>& names) {
  Draft draft = open_grafted(module, "remove_adapters");
  std::string active = active_name(module);
  std::vector<std::string> compositions;  // of `names`
  // Compositions first: an adapter may go with the one that uses it.
  for (const std::string& name : names) {
    const auto gone =
        std::erase_if(draft.compositions, [&](const NamedComposition& held) { return held.name == name; });
    active = gone > 0 && active == name ? "" : active;
    compositions.insert(compositions.end(), gone, name);
  }
  for (const std::string& name : names) {
    if (std::find(compositions.begin(), compositions.end(), name) != compositions.end()) {
      continue;
    }
    const size_t index = find_plain(draft, name, "remove_adapters");
    check_not_composed(draft.compositions, {name}, "remove_adapters");
    TORCH_CHECK(!draft.adapters[index].merged, "remove_adapters: '", name,
                "' is merged into the base's weights; unmerge it first, or ungraft to keep the merged weights");
    draft.adapters.erase(draft.adapters.begin() + static_cast<int64_t>(index));
    active = active == name ? "" : active;
  }
  for (const NamedComposition& composition : draft.compositions) {
    ids_of_tasks(composition.tree, names_of(draft.adapters), draft.compositions, "remove_adapters");
  }
  TORCH_CHECK(!draft.adapters.empty(), "remove_adapters: this removes the last adapter; ungraft gives the base");
  return build(std::move(draft), active);
}

Module rename_adapter(const Module& module, const std::string& name, const std::string& new_name) {
  Draft draft = open_grafted(module, "rename_adapter");
  check_free_name(draft, new_name);
  const auto composition = std::find_if(draft.compositions.begin(), draft.compositions.end(),
                                        [&](const NamedComposition& held) { return held.name == name; });
  if (composition != draft.compositions.end()) {
    composition->name = new_name;
  } else {
    draft.adapters[find_plain(draft, name, "rename_adapter")].name = new_name;
    for (AdapterFusion& fusion : draft.fusions) {
      std::replace(fusion.config.adapters.begin(), fusion.config.adapters.end(), name, new_name);
    }
  }
  for (NamedComposition& held : draft.compositions) {
    held.tree = with_renamed(std::move(held.tree), name, new_name);
  }
  const std::string active = active_name(module);
  return build(std::move(draft), active == name ? new_name : active);
}

Module replace_adapter(const Module& module, const AdapterSpec& spec) {
  Draft draft = open_grafted(module, "replace_adapter");
  Adapter& adapter = draft.adapters[find_plain(draft, spec.name, "replace_adapter")];
  TORCH_CHECK(!adapter.merged, "replace_adapter: '", spec.name,
              "' is merged into the base's weights; unmerge it first");
  adapter = make_placed_adapter(spec, draft.sites, draft.module, draft.weights);
  return build(std::move(draft), active_name(module));
}

Module average_adapters(const Module& module, const std::string& name, const std::vector<std::string>& names,
                        const std::vector<double>& weights, bool normalise, const VerifyOptions& verifying) {
  TORCH_CHECK(!names.empty(), "average_adapter: expected the names of adapters to average, got none");
  TORCH_CHECK(weights.empty() || weights.size() == names.size(), "average_adapter: expected ", names.size(),
              " weights, got ", weights.size());
  std::vector<double> shares = weights.empty() ? std::vector<double>(names.size(), 1.0) : weights;
  double sum = 0.0;
  for (const double share : shares) {
    TORCH_CHECK(std::isfinite(share), "average_adapter: expected finite weights, got ", share);
    sum += share;
  }
  if (normalise || weights.empty()) {
    TORCH_CHECK(sum != 0.0, "average_adapter: the weights sum to 0 and cannot be normalised; choose others, or give ",
                "normalize_weights=False");
    std::for_each(shares.begin(), shares.end(), [&](double& share) { share /= sum; });
  }
  Draft draft = open_grafted(module, "average_adapters");
  check_free_name(draft, name);
  std::vector<Adapter> sources;
  for (const std::string& source : names) {
    sources.push_back(draft.adapters[find_plain(draft, source, "average_adapters")]);
    TORCH_CHECK(!sources.back().merged, "average_adapter: '", source, "' is merged; unmerge it first");
    TORCH_CHECK(without_init(sources.back().config) == without_init(sources.front().config), "average_adapter: '",
                source, "' and '", names.front(), "' have different configurations; only equal ones can be averaged");
  }
  draft.adapters.push_back(mean_adapter(sources, shares));
  draft.adapters.back().name = name;
  const at::TensorOptions options = draft.weights;
  const Structure structure = draft.sites.structure;
  Module result = build(std::move(draft), active_name(module));
  if (verifying.verify) {
    check_is_mean(read_adapters(result.attr("adapters").toModule(), structure).back(), sources, shares);
    verify_pairs(
        module, result,
        {"average_adapter",
         [&](const Module& drawn) { return average_adapters(drawn, name, names, weights, normalise, kUnverified); }},
        verifying, options);
  }
  return result;
}

namespace {

// DoRA's norms depend on the base's weights: build() computes them again.
void forget_norms(std::vector<Adapter>& adapters) {
  for (Adapter& adapter : adapters) {
    for (ModuleWeights& weights : adapter.weights) {
      weights.erase("weight_norm");
    }
  }
}

// Others' results, and those of rows without an adapter, change with the base's weights.
void check_is_alone(const Draft& draft, const std::string& name) {
  std::vector<std::string> others;
  for (const Adapter& adapter : draft.adapters) {
    if (adapter.name != name) {
      others.push_back(adapter.name);
    }
  }
  for (const NamedComposition& composition : draft.compositions) {
    others.push_back(composition.name);
  }
  TORCH_CHECK(others.empty(), "merge_adapter: the module has other adapters too (", c10::Join(", ", others),
              "), which would run on the merged weights, and so would rows without an adapter; remove them first, or "
              "say that this is meant: into_base=True (torchgraft merge --into-base)");
}

// `merged` has `name` in its base, `unmerged` has not. What the base gains, the adapter loses.
std::vector<SameResult> same_by_merging(const Module& unmerged, const Module& merged, const std::string& name) {
  return {{{unmerged, "forward", name}, {merged, "base_forward"}, "the merged base"},
          {{unmerged, "forward", name}, {merged, "forward", name}, "'" + name + "', merged,"}};
}

// What a base calls of its own accord, and decompose_optimized() leaves.
void check_is_lowered(const Module& module) {
  static const auto kNamespace = c10::Symbol::fromQualString("namespaces::torchgraft");
  for_each_method(module, [](const std::string& name, const std::shared_ptr<torch::jit::Graph>& graph) {
    for_each_node(graph->block(), [&](const torch::jit::Node* node) {
      TORCH_CHECK(node->kind().ns() != kNamespace, "lower: ", name, " calls ", described(node),
                  " of its own accord, which needs libtorchgraft.so and cannot be written as ATen calls; call ",
                  "PyTorch's functions in the model instead");
    });
  });
}

}  // namespace

Module merge_adapter(const Module& module, const std::string& name, const MergeOptions& options) {
  Draft draft = open_grafted(module, "merge_adapter");
  Adapter& adapter = draft.adapters[find_plain(draft, name, "merge_adapter")];
  TORCH_CHECK(!adapter.merged, "merge_adapter: '", name, "' is merged already");
  check_not_composed(draft.compositions, {name}, "merge_adapter");
  check_can_merge(adapter);
  if (!options.into_base) {
    check_is_alone(draft, name);
  }
  const std::vector<MergePlace> places = merge_places(adapter, draft.sites, draft.module);
  check_places_are_all(places, adapter, draft.sites, *draft.canonical.graph, draft.module);
  move_into_base(adapter, places, /*merge=*/true);
  forget_norms(draft.adapters);
  const at::TensorOptions weights = draft.weights;
  Module result = build(std::move(draft), active_name(module));
  if (options.verifying.verify) {
    const auto pairs = [&](const Module& before, const Module& after) {
      std::vector<SameResult> same = same_by_merging(before, after, name);
      for (SameResult& pair : all_as_before(before, unmerge_adapter(after, name, kUnverified))) {
        pair.what += ", merged and unmerged,";
        same.push_back(std::move(pair));
      }
      return same;
    };
    const auto make = [&](const Module& drawn) { return merge_adapter(drawn, name, {options.into_base, kUnverified}); };
    verify_pairs(module, result, {"merge_adapter", make, pairs}, options.verifying, weights);
  }
  return result;
}

Module unmerge_adapter(const Module& module, const std::string& name, const VerifyOptions& verifying) {
  Draft draft = open_grafted(module, "unmerge_adapter");
  Adapter& adapter = draft.adapters[find_plain(draft, name, "unmerge_adapter")];
  TORCH_CHECK(adapter.merged, "unmerge_adapter: '", name, "' is not merged");
  move_into_base(adapter, merge_places(adapter, draft.sites, draft.module), /*merge=*/false);
  forget_norms(draft.adapters);
  const at::TensorOptions weights = draft.weights;
  Module result = build(std::move(draft), active_name(module));
  if (verifying.verify) {
    const auto pairs = [&](const Module& before, const Module& after) { return same_by_merging(after, before, name); };
    const auto make = [&](const Module& drawn) { return unmerge_adapter(drawn, name, kUnverified); };
    verify_pairs(module, result, {"unmerge_adapter", make, pairs}, verifying, weights);
  }
  return result;
}

Module lower(const Module& module, const VerifyOptions& verifying) {
  Draft draft = open_grafted(module, "lower");
  const at::TensorOptions weights = draft.weights;
  Module result = build(std::move(draft), active_name(module));
  const auto graph = whole_graph(result, "grafted_forward");
  decompose_adapters(graph);
  graph->lint();
  replace_whole_graph(result, "grafted_forward", graph);
  check_is_lowered(result);
  loaded_again(result, "lower");
  if (verifying.verify) {
    verify_pairs(module, result, {"lower", [](const Module& drawn) { return lower(drawn, kUnverified); }}, verifying,
                 weights);
  }
  return result;
}

Module ungraft(const Module& module, const VerifyOptions& verifying) {
  check_grafted(module, "ungraft");
  Module result = base_copy(module);
  if (verifying.verify) {
    const std::vector<SameResult> pairs = {{{module, "base_forward"}, {result, "forward"}, "the base alone"}};
    const Verifier verifier = verifier_of_change("ungraft");
    const std::string reason = verify_change(module, pairs, verifying.example, verifier);
    const Draft draft = open_grafted(module, "ungraft");
    std::optional<BaseAndGrafted> drawn;
    if (const DrawnCopy copy = with_drawn_weights(module, draft.adapters); copy.has_drawn) {
      drawn = {result, copy.module};
    }
    const std::string rows = verify_results({result, module}, drawn, verifying.example, draft.weights, {}, verifier);
    warn_of(reason.empty() ? rows : reason, "ungraft");
  }
  return result;
}

}  // namespace torchgraft
