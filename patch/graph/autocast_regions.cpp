#include <torchgraft/patch/graph/autocast_regions.h>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;
using Nodes = std::set<const Node*>;

// no_grad, enable_grad and inference_mode, which cast nothing.
bool casts_nothing(const Value* context) {
  const auto type = context->type()->cast<c10::ClassType>();
  return type && type->name() && type->name()->qualifiedName().starts_with("__torch__.torch.autograd.grad_mode.");
}

// `open`: the contexts that are entered where `block` begins.
void add_nodes(Block* block, std::set<const Value*> open, Nodes& result) {
  for (Node* node : block->nodes()) {
    if (node->kind() == c10::prim::Enter && !casts_nothing(node->input(0))) {
      open.insert(node->input(0));
    } else if (node->kind() == c10::prim::Exit) {
      open.erase(node->input(0));
    } else if (!open.empty()) {
      result.insert(node);
    }
    for (Block* inner : node->blocks()) {
      add_nodes(inner, open, result);
    }
  }
}

}  // namespace

Nodes nodes_under_autocast(torch::jit::Graph& graph) {
  Nodes result;
  add_nodes(graph.block(), {}, result);
  return result;
}

}  // namespace torchgraft
