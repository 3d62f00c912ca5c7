#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace torchgraft {

// Which columns of a linear map's output arrive in `heads` ([batch, heads, tokens, head size]), head by head.
//
// Answered by running what lies between on a tensor of column numbers: views, splits and concatenations are executed,
// whatever computes (rotary embeddings, biases, norms) hands its main operand through. nullopt when the path holds
// something that can be neither executed nor handed through.
std::optional<std::vector<int64_t>> columns_reaching(torch::jit::Value* heads, torch::jit::Node* linear,
                                                     SymbolicShapes& shapes);

}  // namespace torchgraft
