#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

// Shapes behind views, splits and concatenations.
namespace torchgraft {

// The shape of the output of `node`, an op that rearranges, cuts, joins or broadcasts tensors. nullopt for any other
// op, and when the shape cannot be known.
std::optional<Shape> shape_of_layout(SymbolicShapes& shapes, const torch::jit::Node* node);

// The shape of piece number `piece` (-1: any) of `node`, a chunk, split or unbind. nullopt for any other op.
std::optional<Shape> shape_of_piece(SymbolicShapes& shapes, const torch::jit::Node* node, int64_t piece);

// The shape of a node that writes into its first operand. If that operand's shape is unknown (a cache), it follows from
// what is written.
std::optional<Shape> shape_of_written(SymbolicShapes& shapes, const torch::jit::Node* node);

}  // namespace torchgraft
