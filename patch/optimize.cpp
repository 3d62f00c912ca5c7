#include <torchgraft/patch/optimize.h>

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/canonicalise/decompose_optimized.h>
#include <torchgraft/patch/canonicalise/inline_module_arguments.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/dump_graph.h>
#include <torchgraft/patch/graph/whole_graphs.h>
#include <torchgraft/patch/insert/fuse_linear.h>
#include <torchgraft/patch/insert/fuse_residual_norm.h>
#include <torchgraft/patch/insert/guard_attributes.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_change.h>

#include <c10/util/Exception.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;

// The graph of `method` with torchgraft::linear and torchgraft::residual_norm where they fit. Callers find a method by
// its name.
size_t replace_method(Module& module, const char* method, const std::shared_ptr<torch::jit::Graph>& graph) {
  const size_t count = fuse_residual_norm(graph, module) + fuse_linear(graph, module);
  graph->lint();
  GraphDump dump("optimize");
  dump(method, *graph);
  replace_whole_graph(module, method, graph);
  return count;
}

// A method of a base.
size_t optimize_base(Module& module, const char* method) {
  const CanonicalGraph canonical = canonicalise(module, method, AttentionForm::kAsItIs);
  guard_attributes(canonical.graph, canonical.folded);
  return replace_method(module, method, canonical.graph);
}

// grafted_forward is in canonical form already, but for maps whose weights are held transposed (addmm_form.h), which no
// torchgraft::linear takes.
size_t optimize_grafted(Module& module) {
  const auto graph = whole_graph(module, "grafted_forward");
  decompose_optimized(graph);
  return replace_method(module, "grafted_forward", graph);
}

void check_is_trained(const Module& grafted) {
  for (const AdapterInfo& info : list_adapters(grafted)) {
    TORCH_CHECK(!info.trainable, "optimize: '", info.name,
                "' is trainable; optimising comes last: train it, then make ",
                "it a frozen one (freeze_adapter, torchgraft freeze)");
  }
}

// The results of `after` that must be those of `before`.
std::vector<SameResult> same_results(const Module& before, const Module& after) {
  if (!is_grafted(before)) {
    return {{{before}, {after}, "the optimised module"}};
  }
  std::vector<SameResult> pairs = {{{before, "base_forward"}, {after, "base_forward"}, "the optimised base"}};
  for (const AdapterInfo& info : list_adapters(before)) {
    pairs.push_back({{before, "forward", info.name}, {after, "forward", info.name}, "'" + info.name + "', optimised,"});
  }
  return pairs;
}

void verify_optimized(const Module& before, const Module& after, const VerifyOptions& verifying) {
  const Verifier verifier = verifier_of_change("optimize");
  const std::string reason = verify_change(before, same_results(before, after), verifying.example, verifier);
  if (!reason.empty()) {
    TORCH_WARN("optimize: ", reason, ". verify=False does without");
  }
}

}  // namespace

Module optimize(const Module& module, const OptimizeOptions& options) {
  check_no_hooks(module, "optimize");
  Module result = clone_module(module);
  size_t count = 0;
  if (is_grafted(module)) {
    check_is_trained(module);
    count += optimize_grafted(result);
    if (!options.exact_base) {
      count += optimize_base(result, "base_forward");
      forget_original_forward(result);
    }
  } else {
    TORCH_CHECK(!options.exact_base, "optimize: expected a grafted module with exact_base, which keeps its base as it ",
                "is, got one without adapters");
    inline_module_arguments(result);
    count += optimize_base(result, "forward");
  }
  TORCH_CHECK(count > 0, "optimize: forward has no linear map and no norm of a sum whose weight is a floating-point ",
              "parameter of the module or a constant, outside of what runs under torch.autocast; there is nothing to ",
              "optimise");
  if (options.verifying.verify) {
    verify_optimized(module, result, options.verifying);
  }
  return result;
}

}  // namespace torchgraft
