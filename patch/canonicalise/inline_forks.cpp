#include <torchgraft/patch/canonicalise/inline_forks.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/passes/inline_fork_wait.h>

#include <algorithm>

namespace torchgraft {

// PyTorch's pass inlines every fork, but finds only those calls of wait() that read the fork's result directly.
void inline_forks(const std::shared_ptr<torch::jit::Graph>& graph) {
  bool all_are_awaited = true;
  for_each_node(graph->block(), [&](torch::jit::Node* node) {
    if (node->kind() == c10::prim::fork) {
      const auto& uses = node->output()->uses();
      all_are_awaited = all_are_awaited && std::all_of(uses.begin(), uses.end(), [](const torch::jit::Use& use) {
                          return is_aten(use.user, {"wait"});
                        });
    }
  });
  if (all_are_awaited) {
    torch::jit::InlineForkWait(graph);
  }
}

}  // namespace torchgraft
