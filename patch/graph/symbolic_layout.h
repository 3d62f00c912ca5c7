#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

// Shapes behind views, splits and concatenations.
namespace torchgraft {

// The shape of the output of `node`, an op that rearranges, cuts, joins or broadcasts tensors. nullopt for any other
// op, and when the shape cannot be known.
std::optional<Shape> shape_of_layout(SymbolicShapes& shapes, const torch::jit::Node* node);

// The shape of piece number `piece` (-1: any) of `node`, a chunk, split or unbind. nullopt for any other op.
std::optional<Shape> shape_of_piece(SymbolicShapes& shapes, const torch::jit::Node* node, int64_t piece);

// The shape of what `node`, an op that writes some places of its first operand, gives. What is written says what the
// first operand is where nothing else does: a cache.
std::optional<Shape> shape_of_written(SymbolicShapes& shapes, const torch::jit::Node* node);

}  // namespace torchgraft
