#pragma once

#include <torchgraft/activations/activation.h>

namespace torchgraft::ops {

// The table of non-linearities used to be here. These names are for those who still include it from here.
using torchgraft::Activation;
using torchgraft::find_activation;

}  // namespace torchgraft::ops
