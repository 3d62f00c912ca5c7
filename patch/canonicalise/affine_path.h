#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// The slope of an affine path: the product of its constant factors, and the numbers, or tensors with one number for
// each head, that are known only at run time.
struct Factors {
  double constant = 1.0;
  std::vector<std::pair<torch::jit::Value*, bool>> dynamic;  // (number, divides)
  bool operator==(const Factors&) const = default;
};

// Finds the two parts of an affine path: its slope, `factors`, and its bias.
class AffinePath {
 public:
  // `anchor` is a value that exists before the attention and has its dtype and device.
  AffinePath(const std::shared_ptr<torch::jit::Graph>& graph, SymbolicShapes& shapes, torch::jit::Node* product,
             torch::jit::Value* anchor)
      : graph_(graph), shapes_(shapes), product_(product), anchor_(anchor) {}

  // Inserts what the path makes of zero scores at the graph's insertion point; null stands for zero. Fills
  // `factors` on the way.
  torch::jit::Value* bias(torch::jit::Value* scores);

  Factors factors;
  bool understood = true;
  bool reshaped = false;

 private:
  torch::jit::Value* of_branch(torch::jit::Node* branch, size_t output);
  bool keeps_last_dimension(torch::jit::Node* reshape);
  bool is_learned_for_all_keys(torch::jit::Value* added);
  bool scales_keys_alike(torch::jit::Value* factor, const torch::jit::Value* scores);
  // Zeros in the shape of `value`, which is combined with `scores`; of a number, zeros that broadcast against them.
  torch::jit::Value* zero_like(torch::jit::Value* value, const torch::jit::Value* scores);
  torch::jit::Value* broadcasting_zero(const torch::jit::Value* scores);
  // `copy`, made of the step `node`, fills in numbers beside which no score is seen, as the step does.
  torch::jit::Value* with_deep_fill(torch::jit::Node* node, torch::jit::Value* copy);
  torch::jit::Value* copy_with(torch::jit::Node* node, size_t operand, torch::jit::Value* replacement);

  bool is_full(torch::jit::Value* bias);
  torch::jit::Value* bias_of_product();
  torch::jit::Value* with_heads_apart(torch::jit::Node* reshape, torch::jit::Value* bias);

  std::shared_ptr<torch::jit::Graph> graph_;
  SymbolicShapes& shapes_;
  torch::jit::Node* product_;
  torch::jit::Value* anchor_;
};

}  // namespace torchgraft
