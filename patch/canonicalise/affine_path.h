#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// The path from the product of queries and keys to the softmax: scales, masks and reshapes, which are affine together.
namespace torchgraft {

// queries times keys: matmul(q, k), bmm(q, k) or baddbmm(bias, q, k).
bool is_product(const torch::jit::Node* node);
torch::jit::Value* left_factor(torch::jit::Node* product);
torch::jit::Value* right_factor(torch::jit::Node* product);

// A number, or a tensor of rank 0 that is computed from numbers.
bool is_number(const torch::jit::Value* value);

// A view that may lead from [B * h, S, S] to [B, h, S, S], or back.
bool is_reshape(const torch::jit::Node* node);

// The product of queries and keys that `scores` comes from; null when a step in between is not understood.
torch::jit::Node* find_product(const torch::jit::Value* scores);

// All values on the path from `product` to `scores`, and all tensors that its steps read.
torch::jit::ValueSet path_values(const torch::jit::Value* scores, const torch::jit::Node* product);

// Says why a masked_fill or where on the path does not mask; nullopt when all do. One masks when it writes scores so
// low that their probabilities are zero, under a condition that does not depend on the scores.
std::optional<std::string> why_no_mask(const torch::jit::Value* scores, const torch::jit::Node* product,
                                       const torch::jit::Module& root);

// The slope of an affine path: the product of its constant factors, and the numbers that are known only at run time.
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
  torch::jit::Value* zero_like(torch::jit::Value* value);
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
