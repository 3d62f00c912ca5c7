#pragma once

// Where the table of non-linearities used to be, for those who include it from here.
#include <torchgraft/activations/activation.h>

namespace torchgraft::ops {

using torchgraft::Activation;
using torchgraft::find_activation;

}  // namespace torchgraft::ops
