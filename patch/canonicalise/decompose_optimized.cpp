#include <torchgraft/patch/canonicalise/decompose_optimized.h>

#include <torchgraft/patch/canonicalise/decompose_linear.h>
#include <torchgraft/patch/canonicalise/decompose_residual_norm.h>

namespace torchgraft {

void decompose_optimized(const std::shared_ptr<torch::jit::Graph>& graph) {
  decompose_linear(graph);
  decompose_residual_norm(graph);
}

}  // namespace torchgraft
