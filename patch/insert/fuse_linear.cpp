#include <torchgraft/patch/insert/fuse_linear.h>

#include <torchgraft/patch/graph/activation_node.h>
#include <torchgraft/patch/graph/autocast_regions.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/dense_parameter.h>

#include <ATen/ATen.h>

#include <set>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool can_be_fused(const Node* node, const Module& module) {
  if (node->kind() != c10::aten::linear || !is_dense_parameter(node->namedInput("weight"), 2, module)) {
    return false;
  }
  if (is_none(node->namedInput("bias"))) {
    return true;
  }
  if (!is_dense_parameter(node->namedInput("bias"), 1, module)) {
    return false;
  }
  const at::Tensor weight = resolve_tensor(node->namedInput("weight"), module);
  const at::Tensor bias = resolve_tensor(node->namedInput("bias"), module);
  return bias.size(0) == weight.size(0) && bias.scalar_type() == weight.scalar_type();
}

// The node that alone reads the result of `linear`, where it runs whenever `linear` does, and its function's name.
std::pair<Node*, std::string> activation_after(const Node* linear, const std::set<const Node*>& casted) {
  const auto& uses = linear->output()->uses();
  Node* reader = uses.size() == 1 ? uses.front().user : nullptr;
  if (reader == nullptr || reader->owningBlock() != linear->owningBlock() || uses.front().offset != 0 ||
      casted.count(reader)) {
    return {nullptr, "linear"};
  }
  const std::string name = activation_name(reader);
  return name.empty() ? std::pair<Node*, std::string>(nullptr, "linear") : std::pair(reader, name);
}

}  // namespace

size_t fuse_linear(const std::shared_ptr<torch::jit::Graph>& graph, const Module& module) {
  static const auto kLinear = c10::Symbol::fromQualString("torchgraft::linear");
  const std::set<const Node*> casted = nodes_under_autocast(*graph);
  std::vector<Node*> linears;
  for_each_node(graph->block(), [&](Node* node) {
    if (!casted.count(node) && can_be_fused(node, module)) {
      linears.push_back(node);
    }
  });
  for (Node* linear : linears) {
    const auto [activation, name] = activation_after(linear, casted);
    const torch::jit::WithInsertPoint guard(linear);
    std::vector<Value*> inputs = linear->inputs().vec();
    inputs.push_back(graph->insertConstant(name));
    Node* fused = graph->create(kLinear, inputs, 1)->insertBefore(linear);
    fused->copyMetadata(linear);
    Node* last = activation == nullptr ? linear : activation;
    fused->output()->copyMetadata(last->output());
    last->output()->replaceAllUsesWith(fused->output());
    if (activation != nullptr) {
      activation->destroy();
    }
    linear->destroy();
  }
  return linears.size();
}

}  // namespace torchgraft
