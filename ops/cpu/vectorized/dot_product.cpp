#include <ATen/cpu/vec/vec.h>
#include <torchgraft/ops/cpu/vectorized/entries.h>

#include <algorithm>
#include <array>
#include <utility>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Rows of x times rows of w whose sums fill the registers: 24 of 32 with AVX-512, 12 of 16 otherwise.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows = 4;
constexpr int kColumns = 6;
#else
constexpr int kRows = 3;
constexpr int kColumns = 4;
#endif

float sum_of(const Vec& lanes) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_reduce_add_ps(lanes);
#else
  return at::vec::vec_reduce_all([](const Vec& a, const Vec& b) { return a + b; }, lanes);
#endif
}

// sums[i][j] += x[i] . w[j] over `depth`.
template <int R, int C>
inline __attribute__((always_inline)) void accumulate(Vec (&sums)[R][C], const float* x, int64_t x_stride,
                                                      const float* w, int64_t w_stride, int64_t depth) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec left[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      left[i] = Vec::loadu(x + i * x_stride + k);
    }
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      const Vec right = Vec::loadu(w + j * w_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        sums[i][j] = at::vec::fmadd(left[i], right, sums[i][j]);
      }
    }
  }
  if (k < depth) {
    for (int j = 0; j < C; ++j) {
      const Vec right = Vec::loadu(w + j * w_stride + k, depth - k);
      for (int i = 0; i < R; ++i) {
        sums[i][j] = at::vec::fmadd(Vec::loadu(x + i * x_stride + k, depth - k), right, sums[i][j]);
      }
    }
  }
}

template <int R, int C>
void block(const DotProduct& job, int64_t row, int64_t column) {
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j] = Vec(0.0F);
    }
  }
  accumulate<R, C>(sums, job.x + row * job.x_stride, job.x_stride, job.w + column * job.w_stride, job.w_stride,
                   job.depth);
  if (job.depth2 > 0) {
    accumulate<R, C>(sums, job.x2 + row * job.x2_stride, job.x2_stride, job.w2 + column * job.w2_stride, job.w2_stride,
                     job.depth2);
  }
  for (int i = 0; i < R; ++i) {
    float* y = job.y + (row + i) * job.y_stride + column;
    for (int j = 0; j < C; ++j) {
      y[j] = sum_of(sums[i][j]) + (job.bias == nullptr ? 0.0F : job.bias[column + j]);
    }
  }
}

using Block = void (*)(const DotProduct&, int64_t, int64_t);

// kBlocks[(rows - 1) * kColumns + columns - 1]
template <int... I>
constexpr std::array<Block, sizeof...(I)> all_blocks(std::integer_sequence<int, I...>) {
  return {block<I / kColumns + 1, I % kColumns + 1>...};
}
constexpr auto kBlocks = all_blocks(std::make_integer_sequence<int, kRows * kColumns>());

}  // namespace

// A few rows of w stay in the first cache while all of x passes by.
void dot_product(const DotProduct& job) {
  for (int64_t column = 0; column < job.columns; column += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, job.columns - column);
    for (int64_t row = 0; row < job.rows; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, job.rows - row);
      kBlocks[(rows - 1) * kColumns + columns - 1](job, row, column);
    }
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
