#include <torchgraft/patch/canonicalise/canonicalise.h>

#include <torchgraft/patch/canonicalise/decompose_einsum.h>
#include <torchgraft/patch/canonicalise/decompose_fused_encoder.h>
#include <torchgraft/patch/canonicalise/decompose_multihead_attention.h>
#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/fold_rank_checks.h>
#include <torchgraft/patch/canonicalise/fold_repeated_heads.h>
#include <torchgraft/patch/canonicalise/hoist_score_product.h>
#include <torchgraft/patch/canonicalise/inline_calls.h>
#include <torchgraft/patch/canonicalise/merge_twin_branches.h>
#include <torchgraft/patch/canonicalise/raise_linear.h>
#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>
#include <torchgraft/patch/canonicalise/raise_norm.h>
#include <torchgraft/patch/canonicalise/unflatten_rows.h>
#include <torchgraft/patch/canonicalise/unroll_loops.h>
#include <torchgraft/patch/graph/clone_module.h>

#include <torch/csrc/jit/passes/remove_mutation.h>
#include <torch/csrc/jit/passes/shape_analysis.h>

namespace torchgraft {

CanonicalGraph canonicalise(const torch::jit::Module& module, const std::string& method_name) {
  CanonicalGraph result;
  result.graph = module.get_method(method_name).graph()->copy();
  torch::jit::EraseShapeInformation(result.graph);  // a trace's example shapes hold for that example only
  raise_mkldnn_convolution(result.graph);
  inline_calls(result.graph, [&](torch::jit::Node* call) { return decompose_multihead_attention(call, module); });
  merge_twin_branches(result.graph);
  fold_attributes(result.graph, module);
  unroll_loops(result.graph);
  torch::jit::RemoveListMutation(result.graph);
  torch::jit::RemoveTensorMutation(result.graph);
  simplify(result.graph);
  fold_rank_checks(result.graph);
  decompose_fused_encoder(result.graph);
  decompose_einsum(result.graph, module);
  raise_linear(result.graph, module);
  unflatten_rows(result.graph, module);
  raise_norm(result.graph, module);
  hoist_score_product(result.graph);
  result.unraised = raise_attention(result.graph, module);
  fold_repeated_heads(result.graph, module);
  simplify(result.graph);
  result.graph->lint();
  return result;
}

torch::jit::Module canonical_module(const torch::jit::Module& module) {
  torch::jit::Module result = clone_module(module);
  const auto schema = result.get_method("forward").function().getSchema();
  const auto graph = canonicalise(result, "forward").graph;
  const c10::QualifiedName name(*result.type()->name(), "forward");
  const auto unit = result._ivalue()->compilation_unit();
  result.type()->unsafeRemoveMethod("forward");
  unit->unsafeRemoveMethod(name);
  torch::jit::Function* forward = unit->create_function(name, graph);
  forward->setSchema(schema);
  result.type()->addMethod(forward);
  return result;
}

}  // namespace torchgraft
