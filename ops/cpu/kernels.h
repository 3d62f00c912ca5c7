#pragma once

#include <c10/util/BFloat16.h>
#include <torchgraft/ops/cpu/attention_gradient.h>

#include <cstdint>

namespace torchgraft::ops::cpu {

// Numbers in memory that are only read: float32, or bfloat16, which a kernel widens. Sums are float32 either way.
struct Numbers {
  Numbers() = default;
  Numbers(const float* data) : data(data) {}                             // NOLINT(google-explicit-constructor)
  Numbers(const c10::BFloat16* data) : data(data), is_bfloat16(true) {}  // NOLINT(google-explicit-constructor)

  explicit operator bool() const { return data != nullptr; }
  const float* float32() const { return static_cast<const float*>(data); }
  const c10::BFloat16* bfloat16() const { return static_cast<const c10::BFloat16*>(data); }
  float operator[](int64_t index) const {
    return is_bfloat16 ? static_cast<float>(bfloat16()[index]) : float32()[index];
  }
  Numbers operator+(int64_t offset) const {
    return is_bfloat16 ? Numbers(bfloat16() + offset) : Numbers(float32() + offset);
  }

  const void* data = nullptr;
  bool is_bfloat16 = false;
};

enum class FusedActivation { kIdentity, kRelu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid };

// y [rows, columns] = x [rows, depth] w [columns, depth]^T (+ x2 w2^T, of depth2) (+ bias) (+ init): both factors lie
// row-major along the sum, as nn.Linear stores its weight, so no weight is packed (but see w_step). Leading
// dimensions are in elements.
// Each element of y is summed in one fixed order, whatever rows and columns are computed with it; token_product and
// dot_product each have an order of their own. w and w2 have the same dtype.
struct DotProduct {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  bool x_is_bfloat16 = false;  // every number of x is a value that bfloat16 has
  Numbers w;
  int64_t w_stride = 0;
  int64_t w_step = 1;  // between the elements of one row of w; other than 1 only for token_product of float32
  float* y = nullptr;
  int64_t y_stride = 0;
  Numbers bias;                                             // [columns]
  FusedActivation activation = FusedActivation::kIdentity;  // of the products and the bias; token_product alone has it
  const float* init = nullptr;                              // [rows, columns]
  int64_t init_stride = 0;
  int64_t depth2 = 0;
  const float* x2 = nullptr;
  int64_t x2_stride = 0;
  Numbers w2;
  int64_t w2_stride = 0;
};

// y [rows, columns] = init [rows, columns] + x [rows, depth] w [depth, columns]; w lies row-major along the columns:
// for short sums, and for sums over tokens, some of them at a time. init may be y.
struct OuterProduct {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* w = nullptr;
  int64_t w_stride = 0;
  const float* init = nullptr;
  int64_t init_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// softmax(scale q [keys of the prefix, k]^T + mask) [values of the prefix, v] for one head. Every query sees the whole
// prefix. Rows lie head_size apart or more, elements of a row are neighbours.
struct HeadAttention {
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t head_size = 0;
  int64_t prefix = 0;
  const float* q = nullptr;
  int64_t q_stride = 0;
  const float* k = nullptr;
  int64_t k_stride = 0;
  const float* v = nullptr;
  int64_t v_stride = 0;
  const float* prefix_key = nullptr;    // [prefix, head_size], times key_gate
  const float* prefix_value = nullptr;  // [prefix, head_size], times value_gate
  float key_gate = 1.0F;
  float value_gate = 1.0F;
  float scale = 1.0F;
  const float* mask = nullptr;  // added to the scores; may be null
  int64_t mask_row_stride = 0;
  int64_t mask_column_stride = 0;
  bool is_causal = false;   // query i sees keys 0 to i, beside the prefix
  float* output = nullptr;  // [queries, head_size]; 0 where a query sees nothing
  int64_t output_stride = 0;
  float* log_sum_exp = nullptr;  // [queries]; 0 where a query sees nothing
  int64_t log_sum_exp_stride = 0;
  float* workspace = nullptr;  // attention_workspace(...) elements
};

// The inner loops, on raw pointers: every source of ops/cpu/vectorized/ is compiled once for each instruction set, and
// each copy fills in one of these tables.
struct Kernels {
  const char* instruction_set;               // "default", "avx2" or "avx512"
  bool is_fast;                              // in float32: measured to be faster than ATen's compositions
  bool is_fast_in_bfloat16;                  // the same
  bool has_tiles_of_bfloat16;                // AMX: ATen's large products of bfloat16 are faster than all here
  void (*dot_product)(const DotProduct&);    // the lanes hold terms of one sum, which are added up at the end
  void (*token_product)(const DotProduct&);  // the lanes hold tokens, which are packed first
  // The same by the processor's own products of bfloat16, where x_is_bfloat16 and w is bfloat16; null: the processor
  // has none. Terms are added by pairs, and numbers below 2^-126 count as 0.
  void (*token_product_bfloat16)(const DotProduct&);
  void (*outer_product)(const OuterProduct&);
  // to [columns, rows] = from [rows, columns] transposed, each times scale[row] (null: 1).
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* scale,
                    float* to, int64_t to_stride);
  void (*widen)(const c10::BFloat16* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, c10::BFloat16* to);  // to the nearest, ties to even
  void (*activate)(FusedActivation, float* values, int64_t count);
  // to = (x - mean) inverse weight + bias, of `count` elements each; weight and bias may be null.
  void (*normalize)(const float* x, int64_t count, float mean, float inverse, const float* weight, const float* bias,
                    float* to);
  // sum = x + residual, and to = (sum - mean) / sqrt(variance + eps) weight + bias, of `count` elements each; weight
  // and bias may be null.
  void (*residual_norm)(const float* x, const float* residual, int64_t count, const float* weight, const float* bias,
                        float eps, float* sum, float* to);
  int64_t (*attention_workspace)(const HeadAttention&);  // bounded, whatever the number of keys
  void (*attention)(const HeadAttention&);
  int64_t (*attention_gradient_workspace)(const HeadAttentionGradient&);  // the same for any number of keys and queries
  void (*attention_gradient)(const HeadAttentionGradient&);
};

// The table of the instruction set that at::get_cpu_capability() names: ATEN_CPU_CAPABILITY=default|avx2 chooses here,
// too.
const Kernels& kernels();

}  // namespace torchgraft::ops::cpu
