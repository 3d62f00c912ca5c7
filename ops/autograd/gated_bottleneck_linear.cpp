#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/gated_bottleneck.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/gated_bottleneck.h>

namespace torchgraft::ops {
namespace {

// Where gradients are recorded the operator is a linear map and a bottleneck, each with a gradient of its own: the two
// share nothing.
std::tuple<at::Tensor, at::Tensor> record_bottleneck_linear(const BottleneckLinearArguments& args) {
  // Here, so that errors name this operator.
  check(args);
  resolve_selection(args.kOperator, args.rows, args.down_weight, /*recording=*/true);
  return record_bottleneck(args.bottleneck(linear_map(args.input, args.weight, args.bias)));
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_bottleneck_linear",
         autograd_kernel<BottleneckLinearArguments, gated_bottleneck_linear, record_bottleneck_linear>);
}

}  // namespace
}  // namespace torchgraft::ops
