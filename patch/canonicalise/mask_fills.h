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

}  // namespace torchgraft
