#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/norm_output.h>
#include <torchgraft/ops/autograd/recording.h>

namespace torchgraft::ops {

at::Tensor accumulate(const at::Tensor& left, const at::Tensor& right) {
  if (!left.defined()) {
    return right;
  }
  return right.defined() ? left + right : left;
}

Norms take_norm_outputs(torch::autograd::variable_list& tensors) {
  Norms norms;
  for (at::Tensor& tensor : tensors) {
    norms.push_back(norm_node_of(tensor));
    if (norms.back()) {
      tensor = at::Tensor();
    }
  }
  return norms;
}

void restore_norm_outputs(const Norms& norms, torch::autograd::variable_list& tensors) {
  TORCH_INTERNAL_ASSERT(tensors.size() == norms.size(), "autograd kept ", tensors.size(), " tensors of ", norms.size());
  for (size_t i = 0; i < norms.size(); ++i) {
    if (norms[i]) {
      tensors[i] = recompute_norm_output(norms[i]);
    }
  }
}

void refuse_double_backward(const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op,
              ": expected create_graph=False, got a double backward, which this op does not support");
}

void refuse_forward_mode(const char* op) {
  C10_THROW_ERROR(NotImplementedError,
                  c10::str(op,
                           ": expected tensors without tangents, got forward-mode differentiation (torch.func.jvp, "
                           "dual tensors), which this op does not support; use reverse mode"));
}

}  // namespace torchgraft::ops
