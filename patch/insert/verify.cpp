#include <torchgraft/patch/insert/verify.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/loaded_again.h>

#include <c10/util/Exception.h>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;

size_t count_ops(const Module& module) {
  size_t count = 0;
  for_each_node(module.get_method("grafted_forward").graph()->block(), [&](Node* node) {
    static const auto known = c10::Symbol::fromQualString("namespaces::torchgraft");
    count += node->kind().ns() == known && is_counted(node->kind().toUnqualString());
  });
  return count;
}

}  // namespace

bool is_counted(std::string_view op) { return op.starts_with("gated_") || op == "reft"; }

void verify_grafted(const Module& module, size_t ops) {
  for (const char* name : {"forward", "forward_with_gates", "grafted_forward", "base_forward"}) {
    module.get_method(name).graph()->lint();
  }
  TORCH_INTERNAL_ASSERT(count_ops(module) == ops, "planned ", ops, " ops, inserted ", count_ops(module));
  const Module loaded = loaded_again(module, "graft");
  TORCH_INTERNAL_ASSERT(count_ops(loaded) == ops, "an op was lost in saving and loading");
}

}  // namespace torchgraft
