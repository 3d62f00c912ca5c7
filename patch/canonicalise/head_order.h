#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// How a dimension of B * h elements counts rows and heads.
enum class HeadOrder {
  kUnknown,
  kHeadsInRows,  // all heads of row 0, then those of row 1: [B, h] viewed as [B * h]
  kRowsInHeads   // all rows of head 0, then those of head 1: [h, B] viewed as [h * B]
};

// The order in dimension 0 of `value`, as far as the views, transposes and concatenations that make it show it. A
// dimension without a constant factor has one head: kHeadsInRows.
HeadOrder head_order(SymbolicShapes& shapes, torch::jit::Value* value);

}  // namespace torchgraft
