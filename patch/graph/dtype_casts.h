#pragma once

#include <torch/csrc/jit/ir/ir.h>

// Casts between dtypes in a graph, for passes that put one op in the place of several.
namespace torchgraft {

// x.to(dtype), and no change of device or layout.
bool is_dtype_cast(const torch::jit::Node* node);

// x.type_as(other) and x.to(other).
bool is_cast_like(const torch::jit::Node* node);

// `value` before any of both.
torch::jit::Value* strip_casts(torch::jit::Value* value);

// The dtype that elementary ops give their result, promoted operand by operand, as an int in the graph. Nodes go to the
// graph's insertion point, and only where the result may differ from where it started.
class ResultType {
 public:
  // `value` has the dtype of `input`.
  ResultType(torch::jit::Graph& graph, torch::jit::Value* value, torch::jit::Value* input)
      : graph_(&graph), value_(value), input_(input) {}

  // As the result of a cast node.
  void cast(const torch::jit::Node* node);
  void cast_like(torch::jit::Value* value) { current_ = dtype_of(value); }

  // As the result of an op with one more operand, neither of which is a number.
  void promote(torch::jit::Value* operand);

  // The value in this dtype.
  torch::jit::Value* apply();

 private:
  // Null stands for the dtype of `input`.
  torch::jit::Value* dtype_of(torch::jit::Value* value);
  torch::jit::Value* relative(torch::jit::Value* dtype);
  torch::jit::Value* absolute(torch::jit::Value* dtype);

  torch::jit::Graph* graph_;
  torch::jit::Value* value_;
  torch::jit::Value* input_;
  torch::jit::Value* current_ = nullptr;
};

}  // namespace torchgraft
