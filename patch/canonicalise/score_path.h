#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <optional>

// The path from the product of queries and keys to the softmax: scales, masks and reshapes.
namespace torchgraft {

// queries times keys: matmul(q, k), bmm(q, k) or baddbmm(bias, q, k).
bool is_product(const torch::jit::Node* node);
torch::jit::Value* left_factor(torch::jit::Node* product);
torch::jit::Value* right_factor(torch::jit::Node* product);

// A number, or a tensor of rank 0 that is computed from numbers.
bool is_number(const torch::jit::Value* value);

// A tensor that is computed from parameters, buffers and numbers alone: a learned temperature.
bool is_learned(const torch::jit::Value* value);

// What the step `step`, a mul or div, multiplies or divides the scores by.
torch::jit::Value* step_factor(const torch::jit::Node* step);

// A view that may lead from [B * h, S, S] to [B, h, S, S], or back.
bool is_reshape(const torch::jit::Node* node);

// The product of queries and keys that `scores` comes from; null when a step in between is not understood.
torch::jit::Node* find_product(const torch::jit::Value* scores);

// The first sum, going back from `scores`, of two products that may both be of queries and keys; null when there is
// none.
const torch::jit::Node* unclear_sum(const torch::jit::Value* scores);

// All values on the path from `product` to `scores`, all tensors that its steps read, and all that nodes in its
// branches read or make.
torch::jit::ValueSet path_values(const torch::jit::Value* scores, const torch::jit::Node* product);

// The operand of `node` that carries the scores; nullopt when `node` is no step of a path that is understood.
std::optional<size_t> score_operand(const torch::jit::Node* node);

// (step, the product of the factors between the step and the softmax; nullopt when one of them is not constant)
using StepVisitor = std::function<void(torch::jit::Node*, std::optional<double>)>;

// Calls `visit` for every node of the path from `scores` back to the product, whichever side of a branch it is on.
void for_each_step(const torch::jit::Value* scores, const torch::jit::Node* product, const StepVisitor& visit);

// The first node that a branch on the path runs and that must_run_once; null when there is none. The path's bias is
// computed by copies of its branches.
const torch::jit::Node* what_must_run_once(const torch::jit::Value* scores, const torch::jit::Node* product);

}  // namespace torchgraft
