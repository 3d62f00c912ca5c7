#pragma once

#include <torchgraft/ops/arguments.h>

#include <tuple>

namespace torchgraft::ops {

// residual_norm by ATen's calls, each with its own gradient. Checked arguments.
std::tuple<at::Tensor, at::Tensor> composed_residual_norm(const ResidualNormArguments& args);

}  // namespace torchgraft::ops
