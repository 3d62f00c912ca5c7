#include <torchgraft/patch/insert/verify.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/loaded_again.h>
#include <torchgraft/patch/graph/whole_graphs.h>

#include <c10/util/Exception.h>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;

size_t count_in(const Module& module) { return count_ops(*whole_graph(module, "grafted_forward")); }

}  // namespace

bool is_counted(std::string_view op) { return op.starts_with("gated_") || op == "reft"; }

size_t count_ops(torch::jit::Graph& graph) {
  size_t count = 0;
  for_each_node(graph.block(), [&](Node* node) {
    static const auto known = c10::Symbol::fromQualString("namespaces::torchgraft");
    count += node->kind().ns() == known && is_counted(node->kind().toUnqualString());
  });
  return count;
}

void verify_grafted(const Module& module, size_t ops) {
  for (const char* name : {"forward", "forward_with_gates", "grafted_forward", "base_forward"}) {
    module.get_method(name).graph()->lint();
    whole_graph(module, name)->lint();
  }
  TORCH_INTERNAL_ASSERT(count_in(module) == ops, "planned ", ops, " ops, inserted ", count_in(module));
  const Module loaded = loaded_again(module, "graft");
  TORCH_INTERNAL_ASSERT(count_in(loaded) == ops, "an op was lost in saving and loading");
}

}  // namespace torchgraft
