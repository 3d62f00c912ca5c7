#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace torchgraft {

// Which columns of a linear map's output arrive in `heads` ([batch, heads, tokens, head size]), head by head.
//
// Runs the path from the linear map to `heads` on a tensor of column numbers: executes views, splits and
// concatenations, and hands the main operand of whatever computes (rotary embeddings, biases, norms) through. nullopt
// when neither can be done.
std::optional<std::vector<int64_t>> columns_reaching(torch::jit::Value* heads, torch::jit::Node* linear,
                                                     SymbolicShapes& shapes);

}  // namespace torchgraft
