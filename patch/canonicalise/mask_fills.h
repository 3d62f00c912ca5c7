#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <optional>
#include <string>

namespace torchgraft {

// Says why a masked_fill or where on the path does not mask; nullopt when all do. One masks when it writes scores so
// low that their probabilities are zero, under a condition that does not depend on the scores.
std::optional<std::string> why_no_mask(const torch::jit::Value* scores, const torch::jit::Node* product,
                                       const torch::jit::Module& root);

}  // namespace torchgraft
