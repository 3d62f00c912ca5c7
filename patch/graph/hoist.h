#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Moves computations to an earlier point of a graph.
class Hoist {
 public:
  explicit Hoist(const torch::jit::Module& root) : shapes_(root) {}

  // Makes `value` available before `point`, with everything that it is computed from. Sizes, dtypes and devices of
  // tensors that do not exist there yet are read from `anchor` instead, which has the same batch, tokens, dtype and
  // device. False, with the graph still correct, when `value` depends on the contents of something later,
  // or on memory that is written in place in between.
  bool operator()(torch::jit::Value* value, torch::jit::Node* point, torch::jit::Value* anchor);

  // The same without an anchor.
  static bool move(torch::jit::Value* value, torch::jit::Node* point);

 private:
  bool read_from_anchor(torch::jit::Node* metadata, torch::jit::Node* point, torch::jit::Value* anchor);

  SymbolicShapes shapes_;
};

}  // namespace torchgraft
