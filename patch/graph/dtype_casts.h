#pragma once

#include <torch/csrc/jit/ir/ir.h>

// Casts between dtypes in a graph, for passes that replace several ops by one.
namespace torchgraft {

// x.to(dtype), and no change of device or layout.
bool is_dtype_cast(const torch::jit::Node* node);

// x.type_as(other) and x.to(other).
bool is_cast_like(const torch::jit::Node* node);

// `value` before all casts of both kinds.
torch::jit::Value* strip_casts(torch::jit::Value* value);

// Follows the dtype of a value through elementary ops, which promote operand by operand. The dtype is an int in the
// graph. Inserts nodes at the graph's insertion point, and only where the dtype may have changed.
class ResultType {
 public:
  // `value` has the dtype of `input`.
  ResultType(torch::jit::Graph& graph, torch::jit::Value* value, torch::jit::Value* input)
      : graph_(&graph), value_(value), input_(input) {}

  // Takes the dtype that `node`, a cast, casts to.
  void cast(const torch::jit::Node* node);
  void cast_like(torch::jit::Value* value) { current_ = dtype_of(value); }

  // Takes the dtype of an op on the value and `operand`, both tensors.
  void promote(torch::jit::Value* operand);

  // Casts the value to the dtype reached.
  torch::jit::Value* apply();

 private:
  // In these and in current_, null stands for the dtype of `input`.
  torch::jit::Value* dtype_of(torch::jit::Value* value);
  torch::jit::Value* relative(torch::jit::Value* dtype);
  torch::jit::Value* absolute(torch::jit::Value* dtype);

  torch::jit::Graph* graph_;
  torch::jit::Value* value_;
  torch::jit::Value* input_;
  torch::jit::Value* current_ = nullptr;
};

}  // namespace torchgraft
