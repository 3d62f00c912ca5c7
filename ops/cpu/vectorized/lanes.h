#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torchgraft/ops/cpu/vectorized/entries.h>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// `count` rounded up to whole vectors.
constexpr int64_t in_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
