#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace torchgraft {

// How modules of the adapters library draw their parameters, from the default CPU generator: the same numbers in the
// same order, so that a seeded module equals the adapters library's bit for bit.

// As the adapters library's fix_seed: every module that has a seed starts from it, and 0 counts as no seed.
void fix_seed(const std::optional<int64_t>& seed);

at::Tensor uniform_within(at::IntArrayRef sizes, double bound);

// kaiming_uniform_ with leaky-ReLU slope a, from as many inputs as the second size says.
at::Tensor kaiming_uniform(at::IntArrayRef sizes, double slope);

// torch.nn.Linear's defaults.
at::Tensor linear_weight(int64_t out, int64_t in);
at::Tensor linear_bias(int64_t out, int64_t in);

}  // namespace torchgraft
