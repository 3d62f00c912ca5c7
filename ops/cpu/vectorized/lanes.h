#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torchgraft/ops/cpu/vectorized/entries.h>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
