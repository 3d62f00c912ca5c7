#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// What users can get wrong, said once for every dispatch key. All checks read sizes, dtypes and devices only (never
// values) and are safe under symbolic sizes. They throw c10::Error of the form
//   gated_lora: expected lora_a of shape [N, r, 768], got [1, 8, 512]

void check(const LoraArguments& args);
void check(const LoraArguments& args, const at::Tensor& weight, const at::Tensor& bias);  // gated_lora_linear; no base
void check(const BottleneckArguments& args);
// gated_bottleneck_linear; no residual
void check(const BottleneckArguments& args, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
void check(const PrefixArguments& args);
void check_attention_token_mask(const at::Tensor& x, const at::Tensor& attn_mask);

}  // namespace torchgraft::ops
