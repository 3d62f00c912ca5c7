#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/forward/linear.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/kernel_choice.h>
#include <torchgraft/ops/linear.h>

namespace torchgraft::ops {
namespace {

// x [..., I] as rows of tokens, [B, S, I]: a matrix is one row.
at::Tensor token_rows(const at::Tensor& x) { return x.dim() == 2 ? x.unsqueeze(0) : x.flatten(0, -3); }

// Undefined where no fused kernel is taken.
at::Tensor fused_linear(const LinearArguments& args, const Activation& activation) {
  const auto function = cpu::fused_activation(activation.function);
  if (!function || args.x.dim() < 2 || !has_memory(args.x)) {
    return {};
  }
  const at::Tensor rows = token_rows(args.x);
  if (!takes_fused_kernels(FusedOp::kLinear, rows) || !cpu::is_read_in_place(args.weight, rows.size(1))) {
    return {};
  }
  c10::DimVector sizes(args.x.sizes());
  sizes.back() = args.weight.size(0);
  return cpu::activated_linear(rows, args.weight, args.bias, *function).view(sizes);
}

at::Tensor linear_forward(const LinearArguments& args) {
  check(args);
  const at::Tensor fused = fused_linear(args, find_activation(args.non_linearity, args.kOperator));
  return fused.defined() ? fused : composed_linear(args).contiguous();
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("linear", from_schema<LinearArguments, linear_forward, decltype(linear)>);
}

}  // namespace

at::Tensor composed_linear(const LinearArguments& args) {
  const std::optional<at::Tensor> bias = args.bias.defined() ? std::optional(args.bias) : std::nullopt;
  return find_activation(args.non_linearity, args.kOperator).forward(at::linear(args.x, args.weight, bias));
}

}  // namespace torchgraft::ops
