#pragma once

#include <torchgraft/ops/cpu/vectorized/lanes.h>

#include <vector>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

// The rows of w and w2 that belong to a few columns of y, at most `Most`: where they lie, or widened to float32.
// bfloat16 rows of w2 are always widened; those of w only if `floats`.
template <int Most>
class WeightRows {
 public:
  explicit WeightRows(const DotProduct& job, bool floats = true)
      : job_(job), floats_(floats), w_stride_(job.w_stride), w2_stride_(job.w2_stride) {
    if (job.w.is_bfloat16) {
      // A vector more: rows a power of two apart would share few cache sets.
      w_stride_ = floats ? job.depth + kLanes : 0;
      w2_stride_ = job.depth2 + kLanes;
      widened_.resize(Most * (w_stride_ + w2_stride_));
    }
  }
  void set(int64_t first, int64_t columns) {
    for (int64_t i = 0; i < columns; ++i) {
      bias_[i] = job_.bias ? job_.bias[first + i] : 0.0F;
    }
    first_ = first;
    if (!job_.w.is_bfloat16) {
      w_ = job_.w.float32() + first * job_.w_stride;
      w2_ = job_.depth2 > 0 ? job_.w2.float32() + first * job_.w2_stride : nullptr;
      return;
    }
    float* to = widened_.data();
    w_ = floats_ ? to : nullptr;
    w2_ = to + Most * w_stride_;
    for (int64_t i = 0; i < columns; ++i) {
      if (floats_) {
        widen(job_.w.bfloat16() + (first + i) * job_.w_stride, job_.depth, to + i * w_stride_);
      }
      if (job_.depth2 > 0) {
        widen(job_.w2.bfloat16() + (first + i) * job_.w2_stride, job_.depth2, to + Most * w_stride_ + i * w2_stride_);
      }
    }
  }
  const float* w() const { return w_; }  // null: bfloat16_w() is to be read
  const float* w2() const { return w2_; }
  int64_t w_stride() const { return w_stride_; }
  int64_t w_step() const { return job_.w_step; }
  int64_t w2_stride() const { return w2_stride_; }
  const c10::BFloat16* bfloat16_w() const { return job_.w.bfloat16() + first_ * job_.w_stride; }
  int64_t bfloat16_w_stride() const { return job_.w_stride; }
  const float* bias() const { return bias_; }  // [Most] and to a multiple of four

 private:
  const DotProduct& job_;
  bool floats_;
  int64_t first_ = 0;
  int64_t w_stride_;
  int64_t w2_stride_;
  const float* w_ = nullptr;
  const float* w2_ = nullptr;
  float bias_[(Most + 3) / 4 * 4] = {};
  std::vector<float> widened_;
};

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
