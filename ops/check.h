#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// What users can get wrong, said once for every dispatch key. All checks read sizes, dtypes and devices only (never
// values) and are safe under symbolic sizes. They throw c10::Error of the form
//   gated_lora: expected lora_a of shape [N, r, 768], got [1, 8, 512]

void check(const LoraArguments& args);
void check(const LoraLinearArguments& args);
void check(const BottleneckArguments& args);
void check(const BottleneckLinearArguments& args);
void check(const PrefixArguments& args);
void check(const ReftArguments& args);
void check(const LinearArguments& args);
void check(const ResidualNormArguments& args);
// `sum`: x + residual.
void check_sum(const ResidualNormArguments& args, const at::Tensor& sum);
void check(const TokenMaskArguments& args);

}  // namespace torchgraft::ops
