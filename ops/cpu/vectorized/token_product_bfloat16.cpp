#include <torchgraft/ops/cpu/vectorized/token_blocks.h>

#include <bit>
#include <cstring>

// By the instruction of AVX512-BF16 that multiplies bfloat16 by pairs: 32 products where float32 has 16. It adds the
// second term of a pair first, rounds to the nearest, and treats subnormal numbers, also its own sums, as 0.

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

// The bits of two neighbouring terms where those of one float32 would be.
float pair_at(const c10::BFloat16* w) {
  float pair;
  std::memcpy(&pair, w, sizeof(pair));
  return pair;
}
float last_at(const c10::BFloat16* w) { return std::bit_cast<float>(static_cast<uint32_t>(w->x)); }

inline Vec add_pairs(const Vec& left, const Vec& right, const Vec& sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(left), (__m512bh)_mm512_castps_si512(right));
}
inline HalfVec add_pairs(const HalfVec& left, const HalfVec& right, const HalfVec& sum) {
  return _mm256_dpbf16_ps(sum, (__m256bh)_mm256_castps_si256(left), (__m256bh)_mm256_castps_si256(right));
}

// Two terms in each lane. Weights are read where they are, without widening. If the number of terms is odd, the last
// one has 0 beside it.
struct Pairs {
  static constexpr bool kReadsFloats = false;
  static int64_t rows(int64_t depth) { return (depth + 1) / 2; }

  // x holds values of bfloat16: the upper halves of their bits are all there is.
  static void pack(const float* x, int64_t stride, int64_t tokens, int64_t depth, int64_t width, float* to) {
    constexpr int64_t kTerms = 64;  // at a time, even
    alignas(64) float singles[kTerms * kPanel];
    for (int64_t first = 0; first < depth; first += kTerms) {
      const int64_t terms = std::min(kTerms, depth - first);
      if (tokens < width || terms % 2 != 0) {
        std::fill_n(singles, 2 * rows(terms) * width, 0.0F);
      }
      transpose(x + first, stride, tokens, terms, nullptr, singles, width);
      for (int64_t k = 0; k < terms; k += 2) {
        join(singles + k * width, width, to + (first + k) / 2 * width);
      }
    }
  }

  template <typename V, int R, int C>
  static inline __attribute__((always_inline)) void accumulate(V (&sums)[R][C], const WeightRows<kRows>& rows,
                                                               const float* x, const Part& part) {
    const c10::BFloat16* w = rows.bfloat16_w() + part.first;
    const int64_t depth = part.depth;
    const int64_t stride = rows.bfloat16_w_stride();
    for (int64_t k = 0; k < depth / 2; ++k) {
      add<V, R, C>(sums, x + k * C * V::size(), [&](int i) { return pair_at(w + i * stride + 2 * k); });
    }
    if (depth % 2 != 0) {
      add<V, R, C>(sums, x + depth / 2 * C * V::size(), [&](int i) { return last_at(w + i * stride + depth - 1); });
    }
  }

 private:
  // to [width] = the pairs of singles [2, width]
  static void join(const float* singles, int64_t width, float* to) {
    for (int64_t i = 0; i < width; ++i) {
      const auto low = std::bit_cast<uint32_t>(singles[i]) >> 16;
      const auto high = std::bit_cast<uint32_t>(singles[width + i]) & 0xFFFF0000U;
      to[i] = std::bit_cast<float>(high | low);
    }
  }

  template <typename V, int R, int C, typename Weight>
  static inline __attribute__((always_inline)) void add(V (&sums)[R][C], const float* x, const Weight& weight) {
    V right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      right[j] = V::loadu(x + j * V::size());
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V left(weight(i));
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        sums[i][j] = add_pairs(left, right[j], sums[i][j]);
      }
    }
  }
};

}  // namespace

void token_product_bfloat16(const DotProduct& job) { product_by_tokens<Pairs>(job); }

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
