#include <torchgraft/patch/canonicalise/canonicalise.h>

#include <torchgraft/patch/canonicalise/collect_appends.h>
#include <torchgraft/patch/canonicalise/decompose_einsum.h>
#include <torchgraft/patch/canonicalise/decompose_fused_encoder.h>
#include <torchgraft/patch/canonicalise/decompose_linear.h>
#include <torchgraft/patch/canonicalise/decompose_linear_relu.h>
#include <torchgraft/patch/canonicalise/decompose_multihead_attention.h>
#include <torchgraft/patch/canonicalise/decompose_residual_norm.h>
#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/fold_rank_checks.h>
#include <torchgraft/patch/canonicalise/fold_repeated_heads.h>
#include <torchgraft/patch/canonicalise/follow_writes.h>
#include <torchgraft/patch/canonicalise/hoist_common_steps.h>
#include <torchgraft/patch/canonicalise/hoist_score_product.h>
#include <torchgraft/patch/canonicalise/inline_calls.h>
#include <torchgraft/patch/canonicalise/inline_forks.h>
#include <torchgraft/patch/canonicalise/merge_twin_branches.h>
#include <torchgraft/patch/canonicalise/raise_linear.h>
#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>
#include <torchgraft/patch/canonicalise/raise_norm.h>
#include <torchgraft/patch/canonicalise/raise_softmax.h>
#include <torchgraft/patch/canonicalise/remove_writes.h>
#include <torchgraft/patch/canonicalise/select_parts.h>
#include <torchgraft/patch/canonicalise/unflatten_rows.h>
#include <torchgraft/patch/canonicalise/unpacked_results.h>
#include <torchgraft/patch/canonicalise/unroll_loops.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/dump_graph.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/passes/remove_mutation.h>
#include <torch/csrc/jit/passes/shape_analysis.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <vector>

namespace torchgraft {

namespace {

using torch::jit::Graph;
using torch::jit::Module;

// PyTorch's pass believes schemas that promise new tensors (SharedMemory).
void remove_tensor_mutation(const std::shared_ptr<Graph>& graph) {
  std::vector<torch::jit::Node*> writers;
  for_each_node(graph->block(), [&](torch::jit::Node* node) {
    if (is_writer(node) && !node->inputs().empty()) {
      writers.push_back(node);
    }
  });
  if (writers.empty()) {
    return;
  }
  const SharedMemory memory(graph);
  std::set<const torch::jit::Node*> safe;
  std::copy_if(writers.begin(), writers.end(), std::inserter(safe, safe.end()),
               [&](torch::jit::Node* writer) { return memory.connected({writer->input(0)}).size() == 1; });
  torch::jit::RemoveTensorMutation(graph, [&](torch::jit::Node* writer) { return safe.count(writer) > 0; });
}

struct Pass {
  const char* name;
  void (*run)(CanonicalGraph& canonical, const Module& module);
  bool is_of_attention = false;
};

// In execution order: a pass may rely on the work of those above it.
const Pass kFlattening[] = {
    {"erase_shapes",  // a trace's example shapes hold for that example only
     [](CanonicalGraph& c, const Module&) { torch::jit::EraseShapeInformation(c.graph); }},
    {"raise_mkldnn_convolution", [](CanonicalGraph& c, const Module&) { raise_mkldnn_convolution(c.graph); }},
    {"inline_calls",
     [](CanonicalGraph& c, const Module& m) {
       inline_calls(c.graph, [&](torch::jit::Node* call) { return decompose_multihead_attention(call, m); });
     }},
    // A layer that runs in a fork then runs where the fork stands. find_sites() names forks that stay.
    {"inline_forks", [](CanonicalGraph& c, const Module&) { inline_forks(c.graph); }},
    {"inline_calls_of_forks",
     [](CanonicalGraph& c, const Module& m) {
       inline_calls(c.graph, [&](torch::jit::Node* call) { return decompose_multihead_attention(call, m); });
     }},
    {"merge_twin_branches", [](CanonicalGraph& c, const Module&) { merge_twin_branches(c.graph); }},
    {"fold_attributes", [](CanonicalGraph& c, const Module& m) { c.folded = fold_attributes(c.graph, m); }},
    {"unroll_loops", [](CanonicalGraph& c, const Module&) { unroll_loops(c.graph); }},
    {"hoist_common_steps", [](CanonicalGraph& c, const Module&) { hoist_common_steps(c.graph); }},
    {"collect_appends", [](CanonicalGraph& c, const Module&) { collect_appends(c.graph); }},
    {"remove_list_mutation", [](CanonicalGraph& c, const Module&) { torch::jit::RemoveListMutation(c.graph); }},
};

// On a graph that returns what its result is packed of: UnpackedResults.
const Pass kRaising[] = {
    {"remove_writes", [](CanonicalGraph& c, const Module&) { remove_writes(c.graph); }},
    {"remove_tensor_mutation", [](CanonicalGraph& c, const Module&) { remove_tensor_mutation(c.graph); }},
    {"simplify", [](CanonicalGraph& c, const Module&) { simplify(c.graph); }},
    {"follow_writes", [](CanonicalGraph& c, const Module&) { follow_writes(c.graph); }},
    {"fold_training",
     [](CanonicalGraph& c, const Module& m) {
       const auto folded = fold_training(c.graph, m);
       c.folded.insert(c.folded.end(), folded.begin(), folded.end());
     }},
    {"fold_rank_checks", [](CanonicalGraph& c, const Module&) { fold_rank_checks(c.graph); }},
    {"decompose_fused_encoder", [](CanonicalGraph& c, const Module&) { decompose_fused_encoder(c.graph); }},
    {"decompose_linear", [](CanonicalGraph& c, const Module&) { decompose_linear(c.graph); }},
    {"decompose_residual_norm", [](CanonicalGraph& c, const Module&) { decompose_residual_norm(c.graph); }},
    {"decompose_linear_relu", [](CanonicalGraph& c, const Module&) { decompose_linear_relu(c.graph); }},
    {"decompose_einsum", [](CanonicalGraph& c, const Module& m) { decompose_einsum(c.graph, m); }},
    {"raise_linear", [](CanonicalGraph& c, const Module& m) { raise_linear(c.graph, m); }},
    {"select_parts", [](CanonicalGraph& c, const Module& m) { select_parts(c.graph, m); }},
    {"unflatten_rows", [](CanonicalGraph& c, const Module& m) { unflatten_rows(c.graph, m); }},
    {"raise_norm", [](CanonicalGraph& c, const Module& m) { raise_norm(c.graph, m); }},
    {"raise_softmax", [](CanonicalGraph& c, const Module&) { raise_softmax(c.graph); }},
    {"hoist_score_product", [](CanonicalGraph& c, const Module&) { hoist_score_product(c.graph); }, true},
    {"raise_attention", [](CanonicalGraph& c, const Module& m) { c.unraised = raise_attention(c.graph, m); }, true},
    {"fold_repeated_heads", [](CanonicalGraph& c, const Module& m) { fold_repeated_heads(c.graph, m); }, true},
    {"simplify", [](CanonicalGraph& c, const Module&) { simplify(c.graph); }},
};

}  // namespace

CanonicalGraph canonicalise(const Module& module, const std::string& method_name, AttentionForm attention) {
  CanonicalGraph result;
  result.graph = module.get_method(method_name).graph()->copy();
  GraphDump dump("canonicalise_" + method_name);
  dump("method", *result.graph);
  for (const Pass& pass : kFlattening) {
    pass.run(result, module);
    dump(pass.name, *result.graph);
  }
  {
    const UnpackedResults unpacked(result.graph);
    for (const Pass& pass : kRaising) {
      if (attention == AttentionForm::kRaised || !pass.is_of_attention) {
        pass.run(result, module);
        dump(pass.name, *result.graph);
      }
    }
  }
  result.graph->lint();
  return result;
}

Module canonical_module(const Module& module) {
  check_no_hooks(module, "canonical_module");
  Module result = clone_module(module);
  const auto schema = result.get_method("forward").function().getSchema();
  const auto graph = canonicalise(result, "forward").graph;
  remove_method(result, "forward");
  add_method(result, "forward", graph, schema.arguments(), schema.returns());
  return result;
}

}  // namespace torchgraft
