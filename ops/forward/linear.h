#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// linear by ATen's calls, each with its own gradient. Checked arguments.
at::Tensor composed_linear(const LinearArguments& args);

}  // namespace torchgraft::ops
