#include <torchgraft/ops/cpu/vectorized/lanes.h>
#include <torchgraft/ops/cpu/vectorized/weight_rows.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

// Rows of x times rows of w whose sums fill the registers: 24 of 32 with AVX-512, 12 of 16 otherwise.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRows = 4;
constexpr int kColumns = 6;
#else
constexpr int kRows = 3;
constexpr int kColumns = 4;
#endif

// sums[i] = bias[i] + the sum of the lanes of one of four vectors, in an order that the other three do not change.
#if defined(CPU_CAPABILITY_AVX512)
void four_sums(const Vec& a, const Vec& b, const Vec& c, const Vec& d, const float* bias, float* sums) {
  // In every 128 bits: a0 + a2, b0 + b2, a1 + a3, b1 + b3, then a, b, c, d.
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(sums, _mm_add_ps(total, _mm_loadu_ps(bias)));
}
#elif defined(CPU_CAPABILITY_AVX2)
void four_sums(const Vec& a, const Vec& b, const Vec& c, const Vec& d, const float* bias, float* sums) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  const __m128 total = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(total, _mm_loadu_ps(bias)));
}
#else
void four_sums(const Vec& a, const Vec& b, const Vec& c, const Vec& d, const float* bias, float* sums) {
  const auto add = [](const Vec& left, const Vec& right) { return left + right; };
  for (const Vec& lanes : {a, b, c, d}) {
    *sums++ = at::vec::vec_reduce_all(add, Vec(lanes)) + *bias++;
  }
}
#endif

// sums[i][j] += x[i] . w[j] over `depth`. Fetches what lies `ahead` numbers behind each line of w.
template <int R, int C>
inline __attribute__((always_inline)) void accumulate(Vec (&sums)[R][C], const float* x, int64_t x_stride,
                                                      const float* w, int64_t w_stride, int64_t depth, int64_t ahead) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec left[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      left[i] = Vec::loadu(x + i * x_stride + k);
    }
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      fetch_ahead(w, j * w_stride + k + ahead);
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

using Panel = WeightRows<kColumns>;

// How far behind a row of w the row lies that is asked for when that row is read: whole panels, a page at least.
int64_t rows_ahead(int64_t w_stride) {
  const int64_t panels = 1 + kPage / std::max<int64_t>(kColumns * w_stride, 1);
  return panels * kColumns * w_stride;
}

// panel: of the columns from `column` on
template <int R, int C>
void block(const DotProduct& job, const Panel& panel, int64_t row, int64_t column) {
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j] = Vec(0.0F);
    }
  }
  accumulate<R, C>(sums, job.x + row * job.x_stride, job.x_stride, panel.w(), panel.w_stride(), job.depth,
                   rows_ahead(panel.w_stride()));
  if (job.depth2 > 0) {
    accumulate<R, C>(sums, job.x2 + row * job.x2_stride, job.x2_stride, panel.w2(), panel.w2_stride(), job.depth2,
                     /*ahead=*/0);
  }
  // On the stack: the compiler would have to expect that every value written through y changes one of the inputs.
  float row_sums[R][(C + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; j += 4) {
      const auto& lanes = sums[i];
      four_sums(lanes[j], lanes[j + 1 < C ? j + 1 : j], lanes[j + 2 < C ? j + 2 : j], lanes[j + 3 < C ? j + 3 : j],
                panel.bias() + j, row_sums[i] + j);
    }
  }
  for (int i = 0; i < R; ++i) {
    if (job.init != nullptr) {
      const float* init = job.init + (row + i) * job.init_stride + column;
      for (int j = 0; j < C; ++j) {
        row_sums[i][j] = init[j] + row_sums[i][j];
      }
    }
    std::memcpy(job.y + (row + i) * job.y_stride + column, row_sums[i], C * sizeof(float));
  }
}

using Block = void (*)(const DotProduct&, const Panel&, int64_t, int64_t);

// kBlocks[(rows - 1) * kColumns + columns - 1]
template <int... I>
constexpr std::array<Block, sizeof...(I)> all_blocks(std::integer_sequence<int, I...>) {
  return {block<I / kColumns + 1, I % kColumns + 1>...};
}
constexpr auto kBlocks = all_blocks(std::make_integer_sequence<int, kRows * kColumns>());

}  // namespace

// A few rows of w stay in the first cache while all of x is read.
void dot_product(const DotProduct& job) {
  Panel panel(job);
  for (int64_t column = 0; column < job.columns; column += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, job.columns - column);
    panel.set(column, columns);
    for (int64_t row = 0; row < job.rows; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, job.rows - row);
      kBlocks[(rows - 1) * kColumns + columns - 1](job, panel, row, column);
    }
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
