#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/normalize.h>
#include <torchgraft/ops/forward/residual_norm.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/kernel_choice.h>
#include <torchgraft/ops/residual_norm.h>

namespace torchgraft::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;

bool is_float32(const at::Tensor& tensor) {
  return !tensor.defined() || (has_memory(tensor) && tensor.scalar_type() == at::kFloat);
}

// The sum of dense tensors of one shape lies as they do: it stays what a view of it expects.
bool takes_fused_norm(const ResidualNormArguments& args) {
  return args.x.scalar_type() == at::kFloat && args.x.dim() > 0 && takes_fused_kernels(args.x) &&
         is_float32(args.residual) && args.x.sizes() == args.residual.sizes() && args.normalized_shape.size() == 1 &&
         args.normalized_shape[0] == args.x.size(-1) && args.x.is_contiguous() && args.residual.is_contiguous() &&
         is_float32(args.weight) && is_float32(args.bias);
}

Results residual_norm_forward(const ResidualNormArguments& args) {
  check(args);
  return takes_fused_norm(args) ? cpu::residual_norm(args.x, args.residual, args.weight, args.bias, args.eps)
                                : composed_residual_norm(args);
}

// ATen's calls choose their dtypes under autocast.
Results residual_norm_under_autocast(const ResidualNormArguments& args) {
  check(args);
  return composed_residual_norm(args);
}

void register_under_autocast(torch::Library& m) {
  m.impl("residual_norm", from_schema<ResidualNormArguments, residual_norm_under_autocast, decltype(residual_norm)>);
}

TORCH_LIBRARY_IMPL(torchgraft, AutocastCPU, m) { register_under_autocast(m); }
TORCH_LIBRARY_IMPL(torchgraft, AutocastCUDA, m) { register_under_autocast(m); }

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("residual_norm", from_schema<ResidualNormArguments, residual_norm_forward, decltype(residual_norm)>);
}

}  // namespace

Results composed_residual_norm(const ResidualNormArguments& args) {
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
  };
  const at::Tensor sum = at::add(args.x, args.residual);
  check_sum(args, sum);
  return {at::layer_norm_symint(sum, args.normalized_shape, optional(args.weight), optional(args.bias), args.eps), sum};
}

}  // namespace torchgraft::ops
