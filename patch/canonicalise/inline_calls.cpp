#include <torchgraft/patch/canonicalise/inline_calls.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/api/function_impl.h>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

std::shared_ptr<Graph> callee_graph(Node* call) {
  torch::jit::Function* function = nullptr;
  size_t skipped_inputs = 0;
  if (call->kind() == c10::prim::CallFunction) {
    function = call->input(0)->type()->expectRef<c10::FunctionType>().function();
    skipped_inputs = 1;
  } else {
    const auto class_type = call->input(0)->type()->cast<c10::ClassType>();
    TORCH_CHECK(class_type, "inline_calls: cannot see into the call of '", call->s(c10::attr::name), "' on a value of ",
                call->input(0)->type()->repr_str(), "; script the module with concrete submodule types");
    function = class_type->findMethod(call->s(c10::attr::name));
    TORCH_INTERNAL_ASSERT(function, class_type->repr_str(), " has no method ", call->s(c10::attr::name));
  }
  auto* graph_function = torch::jit::tryToGraphFunction(*function);
  TORCH_CHECK(graph_function, "inline_calls: the function ", function->qualname().qualifiedName(),
              " has no graph; call a scripted or traced function instead");
  graph_function->ensure_defined();
  TORCH_INTERNAL_ASSERT(graph_function->graph()->inputs().size() + skipped_inputs == call->inputs().size(),
                        "the call of ", function->name(), " has ", call->inputs().size(), " inputs, its graph has ",
                        graph_function->graph()->inputs().size());
  return graph_function->graph();
}

void inline_block(Block* block, const CallDecomposition& decompose_call) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it;
    if (node->kind() != c10::prim::CallMethod && node->kind() != c10::prim::CallFunction) {
      for (Block* inner : node->blocks()) {
        inline_block(inner, decompose_call);
      }
      ++it;
      continue;
    }
    Node* before = node->prev();  // the block's own node when `node` is the first
    if (node->kind() != c10::prim::CallMethod || !decompose_call(node)) {
      const bool is_function = node->kind() == c10::prim::CallFunction;
      const auto graph = callee_graph(node);
      replace_node(node, insert_graph_before(node, *graph, node->inputs().slice(is_function ? 1 : 0)));
    }
    it = ++before->iterator();  // the inserted nodes come next
  }
}

}  // namespace

void inline_calls(const std::shared_ptr<Graph>& graph, const CallDecomposition& decompose_call) {
  inline_block(graph->block(), decompose_call);
}

}  // namespace torchgraft
