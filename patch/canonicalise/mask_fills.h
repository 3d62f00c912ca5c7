#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <optional>
#include <string>

namespace torchgraft {

// Says which step of the path does more than scale the scores, add a bias and mask; nullopt when none does. A
// masked_fill or where masks when it writes scores so low that their probabilities are zero. No bias, factor or
// condition may depend on the scores.
std::optional<std::string> why_no_mask(const torch::jit::Value* scores, const torch::jit::Node* product,
                                       const torch::jit::Module& root);

// The input of `step`, a masked_fill or where on a path of scores, with what it fills in.
size_t fill_operand(const torch::jit::Node* step);

// The number in every element of `value`, a number or a tensor; nullopt when it is not known.
std::optional<double> filled_with(const torch::jit::Value* value, const torch::jit::Module& root);

}  // namespace torchgraft
