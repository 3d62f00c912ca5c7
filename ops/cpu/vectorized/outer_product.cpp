#include <torchgraft/ops/cpu/vectorized/lanes.h>

#include <algorithm>
#include <array>
#include <utility>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

// Rows of x times vectors of columns whose sums fill the registers.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows = 6;
constexpr int kVectors = 4;
#else
constexpr int kRows = 6;
constexpr int kVectors = 2;
#endif

template <int R, int C>
void block(const OuterProduct& job, int64_t row, int64_t column) {
  Vec sums[R][C];
  const float* init = job.init + row * job.init_stride + column;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j] = Vec::loadu(init + i * job.init_stride + j * kLanes);
    }
  }
  const float* x = job.x + row * job.x_stride;
  const float* w = job.w + column;
  [[maybe_unused]] const int64_t ahead = kPage / std::max<int64_t>(job.w_stride, 1) * job.w_stride;
  for (int64_t k = 0; k < job.depth; ++k) {
    Vec right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      if constexpr (R <= 2) {  // w comes from memory: it is packed for more rows only
        fetch_ahead(w, k * job.w_stride + j * kLanes + ahead);
      }
      right[j] = Vec::loadu(w + k * job.w_stride + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec left(x[i * job.x_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
      }
    }
  }
  float* y = job.y + row * job.y_stride + column;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j].store(y + i * job.y_stride + j * kLanes);
    }
  }
}

// The last columns, fewer than a vector has.
void narrow_row(const OuterProduct& job, int64_t row, int64_t column) {
  const int64_t count = job.columns - column;
  Vec sum = Vec::loadu(job.init + row * job.init_stride + column, count);
  for (int64_t k = 0; k < job.depth; ++k) {
    sum = at::vec::fmadd(Vec(job.x[row * job.x_stride + k]), Vec::loadu(job.w + k * job.w_stride + column, count), sum);
  }
  sum.store(job.y + row * job.y_stride + column, count);
}

using Block = void (*)(const OuterProduct&, int64_t, int64_t);

// kBlocks[(rows - 1) * kVectors + vectors - 1]
template <int... I>
constexpr std::array<Block, sizeof...(I)> all_blocks(std::integer_sequence<int, I...>) {
  return {block<I / kVectors + 1, I % kVectors + 1>...};
}
constexpr auto kBlocks = all_blocks(std::make_integer_sequence<int, kRows * kVectors>());

}  // namespace

void outer_product(const OuterProduct& job) {
  const int64_t whole = job.columns / kLanes;  // vectors
  for (int64_t row = 0; row < job.rows; row += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, job.rows - row);
    for (int64_t vector = 0; vector < whole; vector += kVectors) {
      const int64_t vectors = std::min<int64_t>(kVectors, whole - vector);
      kBlocks[(rows - 1) * kVectors + vectors - 1](job, row, vector * kLanes);
    }
    for (int64_t i = 0; i < rows && whole * kLanes < job.columns; ++i) {
      narrow_row(job, row + i, whole * kLanes);
    }
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
