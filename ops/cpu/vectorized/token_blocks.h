#pragma once

// What token_product.cpp and token_product_bfloat16.cpp share: each lane of a vector holds a token, so no sums across
// lanes are left to do. A class `Terms` says how the terms of a sum are packed, and how they are added up.

#include <torchgraft/ops/cpu/vectorized/lanes.h>
#include <torchgraft/ops/cpu/vectorized/weight_rows.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

// Rows of w times vectors of tokens whose sums fill the registers: 24 of 32 with AVX-512, 12 of 16 otherwise. The last
// tokens of a tile go into half a vector if they fit: in a whole one, half of the lanes or more would be empty.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kVectors = 4;
constexpr int64_t kHalfVector = 8;
#else
constexpr int kVectors = 2;
constexpr int64_t kHalfVector = 0;
#endif
constexpr int kRows = 6;
constexpr int64_t kPanel = kVectors * kLanes;  // tokens
constexpr int64_t kTokens = 64;                // of a tile, which stays in a cache while all of w is read
constexpr int64_t kColumns = 48;               // of y at a time: whole register blocks, and whole vectors

#ifdef CPU_CAPABILITY_AVX512
struct HalfVec {
  HalfVec() = default;
  HalfVec(__m256 values) : values(values) {}  // NOLINT(google-explicit-constructor)
  explicit HalfVec(float value) : values(_mm256_set1_ps(value)) {}
  static HalfVec loadu(const float* from) { return _mm256_loadu_ps(from); }
  static constexpr int64_t size() { return kHalfVector; }
  void store(float* to) const { _mm256_storeu_ps(to, values); }
  operator __m256() const { return values; }  // NOLINT(google-explicit-constructor)
  __m256 values;
};
inline HalfVec fmadd(const HalfVec& a, const HalfVec& b, const HalfVec& c) {
  return _mm256_fmadd_ps(a.values, b.values, c.values);
}
#endif
using at::vec::fmadd;

// How many of `tokens` the next panel holds: whole vectors, or half of one.
inline int64_t panel_width(int64_t tokens) {
  if (tokens >= kPanel) {
    return kPanel;
  }
  const int64_t vectors = tokens / kLanes + (tokens % kLanes > kHalfVector);
  return vectors == 0 ? kHalfVector : vectors * kLanes;
}

// A tile of tokens in panels of [Terms::rows(depth), width]: tokens lie in the lanes. Missing tokens are zero.
template <typename Terms>
class PackedTokens {
 public:
  PackedTokens(const float* x, int64_t stride, int64_t tokens, int64_t depth)
      : depth_(Terms::rows(depth)), packed_(std::make_unique_for_overwrite<float[]>(in_vectors(tokens) * depth_)) {
    for (int64_t first = 0; first < tokens;) {
      const int64_t width = panel_width(tokens - first);
      Terms::pack(x + first * stride, stride, std::min(width, tokens - first), depth, width,
                  packed_.get() + first * depth_);
      first += width;
    }
  }
  const float* panel(int64_t first) const { return packed_.get() + first * depth_; }

 private:
  int64_t depth_;  // rows of a panel
  std::unique_ptr<float[]> packed_;
};

// Some terms of a sum, of those over x.
struct Part {
  int64_t first;
  int64_t depth;
};

// Terms one by one, float32.
struct Singles {
  static constexpr bool kReadsFloats = true;  // of w: a bfloat16 one is widened first
  static int64_t rows(int64_t depth) { return depth; }

  static void pack(const float* x, int64_t stride, int64_t tokens, int64_t depth, int64_t width, float* to) {
    if (tokens < width) {
      std::fill_n(to, width * depth, 0.0F);
    }
    transpose(x, stride, tokens, depth, nullptr, to, width);
  }

  // w[i * stride + k * step] is element k of row i.
  template <typename V, int R, int C>
  static inline __attribute__((always_inline)) void accumulate(V (&sums)[R][C], const float* w, int64_t stride,
                                                               int64_t step, const float* x, int64_t depth) {
    for (int64_t first = 0; first < depth; first += kLine) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        fetch_ahead(w, (R + i) * stride + first * step);
      }
      const int64_t end = std::min(depth, first + kLine);
      for (int64_t k = first; k < end; ++k) {
        V right[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
          right[j] = V::loadu(x + (k * C + j) * V::size());
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const V left(w[i * stride + k * step]);
#pragma GCC unroll 8
          for (int j = 0; j < C; ++j) {
            sums[i][j] = fmadd(left, right[j], sums[i][j]);
          }
        }
      }
    }
  }

  template <typename V, int R, int C>
  static inline __attribute__((always_inline)) void accumulate(V (&sums)[R][C], const WeightRows<kRows>& rows,
                                                               const float* x, const Part& part) {
    accumulate<V, R, C>(sums, rows.w() + part.first * rows.w_step(), rows.w_stride(), rows.w_step(), x, part.depth);
  }
};

// to [R, kTokens]: R columns of y for the tokens of one panel, of C vectors. x: the terms of `part`; the first part
// begins with the bias, a later one with `to`, where the one before has left off. depth2: 0 before the last part.
template <typename Terms, typename V, int R, int C>
void block(const WeightRows<kRows>& rows, const float* x, const Part& part, const float* x2, int64_t depth2,
           float* to) {
  V sums[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j] = part.first == 0 ? V(rows.bias()[i]) : V::loadu(to + i * kTokens + j * V::size());
    }
  }
  Terms::template accumulate<V, R, C>(sums, rows, x, part);
  Singles::accumulate<V, R, C>(sums, rows.w2(), rows.w2_stride(), /*step=*/1, x2, depth2);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      sums[i][j].store(to + i * kTokens + j * V::size());
    }
  }
}

using Block = void (*)(const WeightRows<kRows>&, const float*, const Part&, const float*, int64_t, float*);

// By [(rows - 1) * kVectors + vectors - 1].
template <typename Terms, int... I>
constexpr std::array<Block, sizeof...(I)> all_blocks(std::integer_sequence<int, I...>) {
  return {block<Terms, Vec, I / kVectors + 1, I % kVectors + 1>...};
}

template <typename Terms>
Block block_of(int64_t rows, int64_t width) {
  static constexpr auto kBlocks = all_blocks<Terms>(std::make_integer_sequence<int, kRows * kVectors>());
#ifdef CPU_CAPABILITY_AVX512
  static constexpr std::array<Block, kRows> kHalfBlocks = {block<Terms, HalfVec, 1, 1>, block<Terms, HalfVec, 2, 1>,
                                                           block<Terms, HalfVec, 3, 1>, block<Terms, HalfVec, 4, 1>,
                                                           block<Terms, HalfVec, 5, 1>, block<Terms, HalfVec, 6, 1>};
  if (width == kHalfVector) {
    return kHalfBlocks[rows - 1];
  }
#endif
  return kBlocks[(rows - 1) * kVectors + width / kLanes - 1];
}

// y [tokens, columns] = activation(sums [columns, kTokens]) transposed (+ init).
inline void store(const DotProduct& job, float* sums, int64_t row, int64_t tokens, int64_t column, int64_t columns) {
  for (int64_t i = 0; i < columns && job.activation != FusedActivation::kIdentity; ++i) {
    activate(job.activation, sums + i * kTokens, tokens);
  }
  float* to = job.y + row * job.y_stride + column;
  if (job.init == nullptr) {
    transpose(sums, kTokens, columns, tokens, nullptr, to, job.y_stride);
    return;
  }
  alignas(64) float rows[kTokens * kColumns];
  transpose(sums, kTokens, columns, tokens, nullptr, rows, kColumns);
  const float* init = job.init + row * job.init_stride + column;
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      to[i * job.y_stride + j] = init[i * job.init_stride + j] + rows[i * kColumns + j];
    }
  }
}

// Terms that are summed at a time: x's stay in the first cache while kColumns rows of w meet them. All of them where a
// row of w must be widened first.
inline int64_t terms_at_a_time(const DotProduct& job, int64_t tokens, bool is_widened) {
  constexpr int64_t kNumbers = 1 << 13;
  return is_widened ? std::max<int64_t>(job.depth, 1) : kNumbers / in_vectors(tokens) / kLine * kLine;
}

// The columns of y from `column` on, for the `tokens` rows from `row` on, whose first is that of x and x2.
template <typename Terms>
void product_of_tile(const DotProduct& job, WeightRows<kRows>& rows, const PackedTokens<Terms>& x,
                     const PackedTokens<Singles>& x2, int64_t row, int64_t tokens, int64_t column) {
  alignas(64) float sums[kColumns * kTokens];
  const int64_t columns = std::min(kColumns, job.columns - column);
  const int64_t terms = terms_at_a_time(job, tokens, Terms::kReadsFloats && job.w.is_bfloat16);
  int64_t first = 0;
  do {
    const Part part{first, std::min(terms, job.depth - first)};
    first += part.depth;
    for (int64_t i = 0; i < columns; i += kRows) {
      const int64_t count = std::min<int64_t>(kRows, columns - i);
      rows.set(column + i, count);
      for (int64_t token = 0; token < tokens;) {
        const int64_t width = panel_width(tokens - token);
        block_of<Terms>(count, width)(rows, x.panel(token) + Terms::rows(part.first) * width, part, x2.panel(token),
                                      first == job.depth ? job.depth2 : 0, sums + i * kTokens + token);
        token += width;
      }
    }
  } while (first < job.depth);
  store(job, sums, row, tokens, column, columns);
}

template <typename Terms>
void product_by_tokens(const DotProduct& job) {
  WeightRows<kRows> rows(job, Terms::kReadsFloats);
  for (int64_t row = 0; row < job.rows; row += kTokens) {
    const int64_t tokens = std::min(kTokens, job.rows - row);
    const PackedTokens<Terms> x(job.x + row * job.x_stride, job.x_stride, tokens, job.depth);
    const PackedTokens<Singles> x2(job.x2 + row * job.x2_stride, job.x2_stride, tokens, job.depth2);
    for (int64_t column = 0; column < job.columns; column += kColumns) {
      product_of_tile(job, rows, x, x2, row, tokens, column);
    }
  }
}

}  // namespace

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
