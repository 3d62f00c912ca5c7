#pragma once

#include <ATen/Parallel.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/cpu/kernels.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace torchgraft::ops::cpu {

// Neighbouring tokens that use one slice of the banks: all of the batch when its rows agree, else one row.
struct TokenRuns {
  int64_t tokens = 0;           // of each run
  std::vector<int64_t> slices;  // by run; -1: base rows

  int64_t count() const { return static_cast<int64_t>(slices.size()); }
};

// For batch rows of `tokens` tokens. Not for a base selection.
TokenRuns token_runs(const Selection& selection, int64_t batch, int64_t tokens);

// Where the values of a dense tensor lie, float32 or bfloat16; null of an undefined one.
Numbers numbers_of(const at::Tensor& tensor);

// Whether multiply() packs tokens into the lanes of vectors. Then a float32 weight may have any w_step.
bool packs_tokens(int64_t row_tokens, int64_t columns);

// Computes `job`, which has no init beside an activation. row_tokens, the tokens of a batch row, and `columns`, those
// of the whole result, choose the kernel: so the bits depend neither on what else is in the batch nor on how the work
// is divided.
void multiply(const DotProduct& job, int64_t row_tokens, int64_t columns);

// `count` neighbouring numbers as float32: where they lie, or widened.
class FloatView {
 public:
  FloatView(Numbers from, int64_t count) : data_(from.float32()) {
    if (from.is_bfloat16) {
      widened_ = std::make_unique_for_overwrite<float[]>(count);
      kernels().widen(from.bfloat16(), count, widened_.get());
      data_ = widened_.get();
    }
  }
  const float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> widened_;
  const float* data_;
};

// Rows of a result, computed in float32: in place, or, for a bfloat16 result, in a buffer until store().
class FloatResult {
 public:
  // to: the first of `rows` rows of `columns` values, `stride` values apart
  FloatResult(bool is_bfloat16, void* to, int64_t rows, int64_t columns, int64_t stride)
      : rows_(rows), columns_(columns), stride_(stride) {
    if (is_bfloat16) {
      to_ = static_cast<c10::BFloat16*>(to);
      beside_ = std::make_unique_for_overwrite<float[]>(rows * columns);
      data_ = beside_.get();
      stride_ = columns;
      to_stride_ = stride;
    } else {
      data_ = static_cast<float*>(to);
    }
  }
  float* data() const { return data_; }
  int64_t stride() const { return stride_; }
  void store() const {
    for (int64_t row = 0; row < rows_ && to_ != nullptr; ++row) {
      kernels().narrow(data_ + row * stride_, columns_, to_ + row * to_stride_);
    }
  }

 private:
  int64_t rows_;
  int64_t columns_;
  int64_t stride_;
  int64_t to_stride_ = 0;
  float* data_;
  c10::BFloat16* to_ = nullptr;
  std::unique_ptr<float[]> beside_;
};

// A bank's slices, [N, ...]; null of an undefined bank. Contiguous banks are read where they are.
class BankSlices {
 public:
  explicit BankSlices(const at::Tensor& bank);
  Numbers of(int64_t slice) const { return first_ ? first_ + slice * size_ : first_; }

 private:
  at::Tensor bank_;
  Numbers first_;
  int64_t size_ = 0;  // elements of one slice
};

// Calls work(run, first token, end token) for tiles of all runs, on all threads. A token's result must not depend on
// the tile that it is in.
template <typename Work>
void for_each_tile(const TokenRuns& runs, const Work& work) {
  constexpr int64_t kTile = 64;     // a tile of x, and of the result, stay in the second cache
  constexpr int64_t kMultiple = 8;  // tokens: what a vector, or half of one, holds
  const int64_t all = runs.count() * runs.tokens;
  const int64_t share = (all + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t tile = std::clamp((share + kMultiple - 1) / kMultiple * kMultiple, kMultiple, kTile);
  const int64_t per_run = (runs.tokens + tile - 1) / tile;
  at::parallel_for(0, runs.count() * per_run, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_run * tile;
      work(i / per_run, first, std::min(runs.tokens, first + tile));
    }
  });
}

}  // namespace torchgraft::ops::cpu
