#pragma once

#include <string>

// What the TorchScript sources that compile_graph() reads have in common.
namespace torchgraft {

// A finite `number` as a literal that reads back as the same double.
std::string number_source(double number);

// The function additive_mask(blocked: Tensor, dtype: int) -> Tensor: -inf where `blocked` (bool) is true, else 0.
const std::string& additive_mask_source();

}  // namespace torchgraft
