#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <optional>
#include <vector>

namespace torchgraft {

// Which dimension of its operand, of `rank` dimensions, each of the result of `node` is: transpose, swapaxes, swapdims,
// t, numpy_T or permute. nullopt for any other op, and when the dimensions cannot be known.
std::optional<std::vector<size_t>> exchanged_dims(SymbolicShapes& shapes, const torch::jit::Node* node, size_t rank);

}  // namespace torchgraft
