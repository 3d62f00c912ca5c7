#include <torchgraft/patch/graph/inline_all.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/passes/inliner.h>

namespace torchgraft {
namespace {

bool can_be_inlined(const torch::jit::Node* node) {
  if (node->kind() == c10::prim::CallFunction) {
    const auto callee = node->input(0)->type()->cast<c10::FunctionType>();
    return callee && callee->function()->isGraphFunction();
  }
  const auto type = node->kind() == c10::prim::CallMethod ? node->input(0)->type()->cast<c10::ClassType>() : nullptr;
  return type && type->getMethod(node->s(c10::attr::name)).isGraphFunction();
}

}  // namespace

void inline_all(torch::jit::Graph& graph) {
  for (bool has_calls = true; has_calls;) {  // ends: TorchScript has no recursion, and what stays does not count
    torch::jit::Inline(graph);
    has_calls = false;
    for_each_node(graph.block(), [&](const torch::jit::Node* node) { has_calls = has_calls || can_be_inlined(node); });
  }
}

}  // namespace torchgraft
