#include <torchgraft/patch/graph/autocast_regions.h>

#include <torch/csrc/jit/ir/constants.h>

#include <optional>
#include <vector>

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

// False where the graph shows that the context turns autocast off.
bool is_enabled(const Value* context) {
  for (const auto& use : context->uses()) {
    const Node* user = use.user;
    const bool sets = user->kind() == c10::prim::SetAttr && use.offset == 0 && user->s(c10::attr::name) == "_enabled";
    const auto value = sets ? torch::jit::toIValue(user->input(1)) : std::nullopt;
    if (value && value->isBool()) {
      return value->toBool();
    }
  }
  return true;
}

// `open`: the contexts that are entered where `block` begins. The last one counts.
void add_nodes(Block* block, std::vector<const Value*> open, Nodes& result) {
  for (Node* node : block->nodes()) {
    if (node->kind() == c10::prim::Enter && !casts_nothing(node->input(0))) {
      open.push_back(node->input(0));
    } else if (node->kind() == c10::prim::Exit) {
      std::erase(open, node->input(0));
    } else if (!open.empty() && is_enabled(open.back())) {
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
