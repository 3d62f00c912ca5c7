#include <torchgraft/patch/optimize.h>

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/canonicalise/inline_module_arguments.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/dump_graph.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/insert/fuse_linear.h>
#include <torchgraft/patch/insert/guard_attributes.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_change.h>

#include <c10/util/Exception.h>

#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;

// Puts the canonical graph of `method`, with its linear maps fused, in the place of the method. Callers find it by its
// name. Returns the number of linear maps.
size_t optimize_method(Module& module, const char* method) {
  const auto schema = module.get_method(method).function().getSchema();
  const CanonicalGraph canonical = canonicalise(module, method);
  const size_t count = fuse_linear(canonical.graph, module);
  guard_attributes(canonical.graph, canonical.folded);
  canonical.graph->lint();
  GraphDump dump("optimize");
  dump(method, *canonical.graph);
  remove_method(module, method);
  add_method(module, method, canonical.graph, schema.arguments(), schema.returns());
  return count;
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
  const std::string reason = verify_change(before, same_results(before, after), verifying.example, "optimize");
  if (!reason.empty()) {
    TORCH_WARN("optimize: ", reason, ". verify=False does without");
  }
}

}  // namespace

Module optimize(const Module& module, const OptimizeOptions& options) {
  Module result = clone_module(module);
  size_t count = 0;
  if (is_grafted(module)) {
    count += optimize_method(result, "grafted_forward");
    count += options.exact_base ? 0 : optimize_method(result, "base_forward");
  } else {
    TORCH_CHECK(!options.exact_base, "optimize: expected a grafted module with exact_base, which keeps its base as it ",
                "is, got one without adapters");
    inline_module_arguments(result);
    count += optimize_method(result, "forward");
  }
  TORCH_CHECK(count > 0,
              "optimize: forward has no linear map whose weight is a floating-point parameter of the module ",
              "or a constant; there is nothing to optimise");
  if (options.verifying.verify) {
    verify_optimized(module, result, options.verifying);
  }
  return result;
}

}  // namespace torchgraft
