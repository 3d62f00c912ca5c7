#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torchgraft/ops/cpu/vectorized/entries.h>

#include <cstdint>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// `count` rounded up to whole vectors.
constexpr int64_t in_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

constexpr int64_t kLine = 16;    // numbers in a line of the cache
constexpr int64_t kPage = 1024;  // numbers in a page of memory, which takes as long to read as memory to answer

// Brings w[offset] into the cache. A weight is read once for many tokens, or for a single one, and comes from memory:
// its rows are too short for the processor to see what follows. w[offset] may lie behind the weight's end.
inline void fetch_ahead(const float* w, int64_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w) + offset * sizeof(float)));
}

inline float lane_sum(const Vec& value) {
  return at::vec::vec_reduce_all([](const Vec& a, const Vec& b) { return a + b; }, value);
}

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
