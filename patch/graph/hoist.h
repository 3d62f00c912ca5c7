#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Moves computations to an earlier point of a graph.
class Hoist {
 public:
  explicit Hoist(const torch::jit::Module& root) : shapes_(root) {}

  // Moves `value`, and all that it is computed from, to before `point`. Where that needs the size, dtype or device of a
  // tensor that does not exist there yet, `anchor` gives it, which has the same batch, tokens, dtype and device.
  // Returns false, and leaves a correct graph, when `value` depends on the contents of such a tensor, or on memory that
  // is written in place in between.
  bool operator()(torch::jit::Value* value, torch::jit::Node* point, torch::jit::Value* anchor);

  // Does the same without an anchor.
  static bool move(torch::jit::Value* value, torch::jit::Node* point);

 private:
  bool read_from_anchor(torch::jit::Node* metadata, torch::jit::Node* point, torch::jit::Value* anchor);

  // The size of `tensor`, inserted before `point`; null when it is not known there.
  torch::jit::Value* size_before(torch::jit::Value* tensor, size_t dim, torch::jit::Node* point,
                                 torch::jit::Value* anchor);

  SymbolicShapes shapes_;
};

}  // namespace torchgraft
