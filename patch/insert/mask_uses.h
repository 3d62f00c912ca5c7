#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstddef>

// What reads a value, and whether that makes it an attention mask.
namespace torchgraft {

// scaled_dot_product_attention, or the op with prefixes that has replaced one.
bool is_attention(const torch::jit::Node* node);

bool is_mask_cast(const torch::jit::Node* node);
bool is_mask_reshape(const torch::jit::Node* node);

// Whether attentions read nothing but this as their mask, reshaped or cast.
bool is_only_mask(torch::jit::Value* value);

// Whether the node adds its input `index` to scores, or sets scores by it, and only attentions read these as masks.
bool sets_scores(torch::jit::Node* node, size_t index);

// Whether this, reshaped, is read for nothing but sets_scores().
bool only_sets_scores(torch::jit::Value* value);

// Whether a linear map, a table or another weight of `root` had a part in the value: it is no mask, which has known
// values for visible tokens.
bool is_of_weights(torch::jit::Value* value, const torch::jit::Module& root);

}  // namespace torchgraft
