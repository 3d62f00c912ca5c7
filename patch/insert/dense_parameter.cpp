#include <torchgraft/patch/insert/dense_parameter.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>

namespace torchgraft {

bool is_dense_parameter(const torch::jit::Value* value, int64_t dimensions, const torch::jit::Module& module) {
  const at::Tensor tensor = resolve_tensor(value, module);
  if (!tensor.defined() || tensor.dim() != dimensions || tensor.layout() != at::kStrided) {
    return false;
  }
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace torchgraft
