#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>

namespace torchgraft {

// Whether `value` is a parameter or a constant of `module` that a fused operator takes: of `dimensions` dimensions,
// dense, in float32, float64, bfloat16 or float16. ATen's operators take sparse and quantised weights, too.
bool is_dense_parameter(const torch::jit::Value* value, int64_t dimensions, const torch::jit::Module& module);

}  // namespace torchgraft
