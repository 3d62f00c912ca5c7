#include <torchgraft/patch/graft.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>
#include <torchgraft/patch/module/check_applied_once.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/exported_methods.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/place_dtypes.h>
#include <torchgraft/patch/module/verify_results.h>
#include <torchgraft/patch/pool/row_size.h>
#include <torchgraft/plan/plan.h>

#include <unistd.h>

#include <algorithm>
#include <optional>
#include <set>

namespace torchgraft {

using torch::jit::Module;

namespace {

// A fresh adapter on some of the layers is no detail: whoever trains it must know.
void check_complete(const Draft& draft, const std::vector<AdapterSpec>& specs, const GraftOptions& options) {
  const bool is_fresh =
      std::any_of(specs.begin(), specs.end(), [](const AdapterSpec& spec) { return !spec.weights.has_value(); });
  const bool was_accepted = draft.options.allow_partial && !options.allow_partial;  // when the module was grafted
  if (draft.sites.left_out.empty() || !is_fresh || was_accepted) {
    return;
  }
  const size_t found = draft.sites.structure.layers.size();
  const std::string text = c10::str("graft: ", found, found == 1 ? " attention is" : " attentions are",
                                    " recognised, others are not and get no adapter:", indented(draft.sites.left_out));
  TORCH_CHECK(
      options.allow_partial, text,
      ".\nallow_partial=True (torchgraft add --allow-partial) grafts onto the recognised ones; so do edited sites, "
      "which say what is wanted (docs/sites.md)");
  TORCH_WARN(text);
}

void check_reads_token_mask(const std::vector<AdapterSpec>& specs, const GraftOptions& options) {
  const auto reads = [&](const AdapterSpec& spec) {
    return has_reft(spec.config) || (options.gate_pooling.empty() && pools_unpadded(spec.config));
  };
  TORCH_CHECK(options.token_mask_input.empty() || options.gate_pooling == kUnpaddedTokens ||
                  std::any_of(specs.begin(), specs.end(), reads),
              "graft: a token mask is used with gate_pooling \"unpadded\" and with ReFT only; leave it out");
}

// The numbers of layers in a directory are those of the module list that held them.
void warn_of_order(const Draft& draft, const std::vector<AdapterSpec>& specs) {
  const bool reads =
      std::any_of(specs.begin(), specs.end(), [](const AdapterSpec& spec) { return spec.weights.has_value(); });
  const auto& layers = draft.sites.structure.layers;
  const bool has_paths = std::any_of(layers.begin(), layers.end(), [](const Layer& layer) {
    return (layer.query && !layer.query->path.empty()) || (layer.output && !layer.output->path.empty());
  });
  if (reads && !has_paths) {
    TORCH_WARN(
        "graft: the module is frozen and has no paths, so layers of the adapter are taken in the order in which they "
        "run; if the model runs them in another order than that of their numbers, graft it before it is frozen");
  }
}

void warn_of_exported(const Module& base) {
  const std::vector<std::string> methods = exported_methods(base);
  if (!methods.empty()) {
    TORCH_WARN("graft: adapters act in forward; what else the module exports keeps the base's results: ",
               c10::Join(", ", methods));
  }
}

// torch.jit.freeze keeps a module with attributes that forward assigns, and frees its methods, which an error would
// name.
void warn_of_assigned(const Module& base) {
  const auto graph = base.get_method("forward").graph()->copy();
  inline_all(*graph);
  std::set<std::string> names;
  for_each_node(graph->block(), [&](const torch::jit::Node* node) {
    if (node->kind() == c10::prim::SetAttr) {
      names.insert("'" + node->s(c10::attr::name) + "'");
    }
  });
  if (!names.empty()) {
    TORCH_WARN("graft: forward assigns ", c10::Join(", ", names),
               "; after torch.jit.freeze, an error while the module runs may end the process: freeze it with ",
               "preserved_attrs=[\"base_forward\", \"grafted_forward\"], and not inside another module");
  }
}

// Before weights are drawn: a slip in a size would end the process without a word.
void check_fits_memory(const AdapterSpec& spec, const Draft& draft) {
  check_supported(spec.config);
  const double needed = least_bytes(make_plan(draft.sites.structure, spec.config), draft.weights);
  const double there = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE));
  const auto in_gigabytes = [](double bytes) { return bytes / 1e9; };
  TORCH_CHECK(needed <= there, "graft: '", spec.name, "' needs ", in_gigabytes(needed),
              " GB for its weights, the machine has ", in_gigabytes(there),
              " GB; choose a smaller r or prefix_length, or a larger reduction_factor");
}

// What does not fit may belong to attention that was not recognised.
Adapter make_adapter_of(const AdapterSpec& spec, const Draft& draft) {
  if (!spec.weights) {
    check_fits_memory(spec, draft);
  }
  if (draft.sites.left_out.empty() || !spec.weights) {
    return make_placed_adapter(spec, draft.sites, draft.module, draft.weights);
  }
  try {
    return make_placed_adapter(spec, draft.sites, draft.module, draft.weights);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, error.msg(), "\nSome attention was not recognised:", indented(draft.sites.left_out));
  }
}

constexpr Verifier kGraftVerifier = {"graft",
                                     "; verify=False (C++: GraftOptions::verify = false) grafts without comparing"};

// A trial with the weights of fresh adapters drawn: as they are they change nothing.
std::string verify_on_inputs(const Module& base, const Module& result, const std::vector<AdapterSpec>& specs,
                             const std::vector<Adapter>& adapters, const GraftOptions& options,
                             const at::TensorOptions& weights) {
  std::vector<std::string> names;
  for (const AdapterSpec& spec : specs) {
    names.push_back(spec.name);
  }
  const std::vector<Adapter> earlier(adapters.begin(), adapters.end() - static_cast<int64_t>(specs.size()));
  const BaseAndGrafted both{base, result};
  return verify_results(both, with_drawn_weights(both, earlier, adapters), options.example, weights, names,
                        kGraftVerifier);
}

}  // namespace

Module graft(const Module& module, const std::vector<AdapterSpec>& specs, const GraftOptions& options) {
  TORCH_CHECK(!specs.empty(), "graft: no adapter was given");
  check_reads_token_mask(specs, options);
  Draft draft = open_draft(module, options);
  check_complete(draft, specs, options);
  warn_of_order(draft, specs);
  if (!is_grafted(module)) {
    warn_of_exported(module);
    warn_of_assigned(module);
  }
  for (AdapterSpec spec : specs) {
    check_free_name(draft, spec.name);
    set_gate_pooling(spec, options.gate_pooling, "graft");
    draft.adapters.push_back(make_adapter_of(spec, draft));
    if (spec.weights) {
      check_applied_once(draft.adapters.back(), draft.sites, "graft");
    }
  }
  const at::TensorOptions weights = draft.weights;
  const std::vector<Adapter> adapters = draft.adapters;
  const Module result = build(std::move(draft), options.active.empty() ? specs.back().name : options.active);
  if (options.verify) {
    const std::string reason = verify_on_inputs(module, result, specs, adapters, options, weights);
    if (!reason.empty()) {
      TORCH_WARN("graft: ", reason, ". verify=False does without");
    }
  }
  return result;
}

}  // namespace torchgraft
