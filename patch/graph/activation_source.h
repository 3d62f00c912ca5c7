#pragma once

#include <string>

namespace torchgraft {

// A non-linearity of activations/activation.h as a TorchScript expression of a Tensor `inner`.
std::string activation_source(const std::string& name);

}  // namespace torchgraft
