#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// ATen's calls on checked arguments. recording: they are to be differentiated, so nothing is written in place.
at::Tensor composed_reft(const ReftArguments& args, bool recording);

}  // namespace torchgraft::ops
