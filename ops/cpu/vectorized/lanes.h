#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torchgraft/ops/cpu/vectorized/entries.h>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// `count` rounded up to whole vectors.
constexpr int64_t in_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline void scale_row(float* row, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    (Vec::loadu(row + i) * Vec(factor)).store(row + i);
  }
  for (; i < count; ++i) {
    row[i] *= factor;
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
