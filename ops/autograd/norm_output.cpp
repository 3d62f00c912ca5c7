#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/variable.h>
#include <torchgraft/ops/autograd/norm_output.h>
#include <torchgraft/ops/cpu/normalize.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

using torch::autograd::Node;
using LayerNormNode = torch::autograd::generated::NativeLayerNormBackward0;

namespace {

bool can_be_recomputed(LayerNormNode& norm, const c10::intrusive_ptr<Node>& node) {
  for (const torch::autograd::SavedVariable* saved :
       {&norm.input_, &norm.result1_, &norm.result2_, &norm.weight_, &norm.bias_}) {
    if (saved->has_hooks()) {
      return false;
    }
  }
  const auto precision = norm.result1_.unpack(node).scalar_type();  // of means and deviations
  return precision == at::kFloat || precision == at::kDouble;
}

// True of an undefined tensor.
bool is_readable(const at::Tensor& tensor) {
  return !tensor.defined() || (has_memory(tensor) && tensor.scalar_type() == at::kFloat);
}

}  // namespace

c10::intrusive_ptr<Node> norm_node_of(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.requires_grad() || at::isTensorSubclassLike(tensor) || tensor._version() != 0) {
    return {};
  }
  torch::autograd::Edge edge(tensor.grad_fn(), tensor.output_nr());
  // An alias (patch/insert/use_eager_autograd.h) is the same tensor.
  while (dynamic_cast<torch::autograd::generated::AliasBackward0*>(edge.function.get()) != nullptr) {
    edge = edge.function->next_edge(0);
  }
  auto* norm = dynamic_cast<LayerNormNode*>(edge.function.get());
  const bool is_result = norm != nullptr && edge.input_nr == 0 && can_be_recomputed(*norm, edge.function);
  return is_result ? edge.function : c10::intrusive_ptr<Node>();
}

at::Tensor recompute_norm_output(const c10::intrusive_ptr<Node>& node) {
  auto* norm = dynamic_cast<LayerNormNode*>(node.get());
  TORCH_INTERNAL_ASSERT(norm != nullptr, "not the node of a layer norm");
  const at::Tensor input = norm->input_.unpack();
  const at::Tensor mean = norm->result1_.unpack(node);     // [..., 1]
  const at::Tensor inverse = norm->result2_.unpack(node);  // [..., 1], of the deviation
  const at::Tensor weight = norm->weight_.unpack();        // undefined: 1
  const at::Tensor bias = norm->bias_.unpack();            // undefined: 0
  if (input.scalar_type() == at::kFloat && takes_fused_kernels(input) && is_readable(weight) && is_readable(bias)) {
    return cpu::normalize(input, mean, inverse, weight, bias);
  }
  at::Tensor result = (input - mean).mul_(inverse);  // in the precision of the mean
  if (weight.defined() && bias.defined()) {
    result = at::addcmul(bias, result, weight);
  } else if (weight.defined()) {
    result.mul_(weight);
  } else if (bias.defined()) {
    result.add_(bias);
  }
  return result.to(input.scalar_type());
}

}  // namespace torchgraft::ops
