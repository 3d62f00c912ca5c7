#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <string>

// What verify_results() adds to the errors of a comparison, and takes for none.
namespace torchgraft {

// What else than the dtype of `weights`, which adapters get, the base computes in, and what to do; or nothing.
// `coarsest`: the coarsest dtype that its forward casts to.
std::string other_dtypes(const torch::jit::Module& base, at::ScalarType coarsest, const at::TensorOptions& weights);

// Why the base itself may have two results; or nothing.
std::string fused_encoder_hint(const torch::jit::Module& base, const std::string& method);

// Whether a run says that rows cannot differ: DeBERTa's share the positions that a LoRA reads (insert_lora.cpp), and in
// some models prompts must be of one length (insert_prompt.cpp).
bool refuses_mixed_rows(const std::string& error);

}  // namespace torchgraft
