#include <torchgraft/patch/insert/fuse_residual_norm.h>

#include <torchgraft/patch/graph/autocast_regions.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/dense_parameter.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// An add in place (add_) writes, which the operator does not.
bool is_sum_of_tensors(const Node* node) {
  return node->kind() == c10::aten::add && has_unit_alpha(node) && is_tensor(node->namedInput("self")) &&
         is_tensor(node->namedInput("other"));
}

// Whether a norm is over one dimension, by parameters that the operator takes.
bool is_plain_norm(const Node* norm, const Module& module) {
  const Value* weight = norm->namedInput("weight");
  const Value* bias = norm->namedInput("bias");
  return is_dense_parameter(weight, 1, module) && (is_none(bias) || is_dense_parameter(bias, 1, module));
}

// Whether all readers of `sum` but `norm` run behind it.
bool is_read_first_by(const Value* sum, const Node* norm) {
  return std::all_of(sum->uses().begin(), sum->uses().end(),
                     [&](const torch::jit::Use& use) { return use.user == norm || norm->isBefore(use.user); });
}

// Whether a `with` block begins or ends between the two: torch.no_grad(), in which one of them stands.
bool are_in_one_scope(Node* add, const Node* norm) {
  for (Node* node = add; node != norm; node = node->next()) {
    if (node->kind() == c10::prim::Enter || node->kind() == c10::prim::Exit) {
      return false;
    }
  }
  return true;
}

bool can_be_fused(Node* norm, const Module& module, const Writes& writes) {
  Value* sum = norm->namedInput("input");
  Node* add = sum->node();
  return is_sum_of_tensors(add) && add->owningBlock() == norm->owningBlock() && norm->isAfter(add) &&
         is_read_first_by(sum, norm) && is_plain_norm(norm, module) && are_in_one_scope(add, norm) &&
         !writes.between(add, norm, {sum, add->namedInput("self"), add->namedInput("other")});
}

}  // namespace

size_t fuse_residual_norm(const std::shared_ptr<torch::jit::Graph>& graph, const Module& module) {
  static const auto kResidualNorm = c10::Symbol::fromQualString("torchgraft::residual_norm");
  const std::set<const Node*> casted = nodes_under_autocast(*graph);
  const Writes writes(graph);
  std::vector<Node*> norms;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"layer_norm"}) && !casted.count(node) && can_be_fused(node, module, writes)) {
      norms.push_back(node);
    }
  });
  for (Node* norm : norms) {
    Node* add = norm->namedInput("input")->node();
    const torch::jit::WithInsertPoint guard(norm);
    const auto inputs = {add->namedInput("self"),    add->namedInput("other"), norm->namedInput("normalized_shape"),
                         norm->namedInput("weight"), norm->namedInput("bias"), norm->namedInput("eps")};
    Node* fused = graph->create(kResidualNorm, inputs, 2)->insertBefore(norm);
    fused->copyMetadata(norm);
    fused->output(0)->copyMetadata(norm->output());
    fused->output(1)->copyMetadata(add->output());
    norm->output()->replaceAllUsesWith(fused->output(0));
    norm->destroy();
    add->output()->replaceAllUsesWith(fused->output(1));
    add->destroy();
  }
  return norms.size();
}

}  // namespace torchgraft
