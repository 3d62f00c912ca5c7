#pragma once

#include <torchgraft/ops/arguments.h>

#include <tuple>

namespace torchgraft::ops {

// gated_bottleneck with a node in autograd's graph; grad mode is on. Returns output and gate.
std::tuple<at::Tensor, at::Tensor> record_bottleneck(const BottleneckArguments& args);

}  // namespace torchgraft::ops
