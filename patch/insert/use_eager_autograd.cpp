#include <torchgraft/patch/insert/use_eager_autograd.h>

#include <torch/csrc/jit/runtime/autodiff.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

bool is_joined(const Node* node) { return node->kind() != c10::prim::Constant && torch::jit::isDifferentiable(node); }

bool has_joined_reader(const Value* value) {
  return std::any_of(value->uses().begin(), value->uses().end(), [](const Use& use) { return is_joined(use.user); });
}

}  // namespace

size_t use_eager_autograd(const std::shared_ptr<Graph>& graph) {
  std::vector<Value*> values;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_joined(node)) {
      std::copy_if(node->outputs().begin(), node->outputs().end(), std::back_inserter(values),
                   [](const Value* output) { return is_tensor(output) && has_joined_reader(output); });
    }
  });
  for (Value* value : values) {
    Node* alias = graph->create(c10::aten::alias, {value})->insertAfter(value->node());
    alias->copyMetadata(value->node());
    alias->output()->setType(value->type());
    value->replaceAllUsesAfterNodeWith(alias, alias->output());
  }
  return values.size();
}

}  // namespace torchgraft
