#include <torchgraft/ops/cpu/vectorized/lanes.h>

#include <algorithm>
#include <cmath>

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {
namespace {

template <typename Function>
void map(float* values, int64_t count, const Function& function) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    function(Vec::loadu(values + i)).store(values + i);
  }
  if (i < count) {
    function(Vec::loadu(values + i, count - i)).store(values + i, count - i);
  }
}

Vec sigmoid(const Vec& x) { return Vec(1.0F) / (Vec(1.0F) + x.neg().exp()); }

}  // namespace

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* scale, float* to,
               int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const auto tall = static_cast<int>(std::min(kLanes, rows - row));
    for (int64_t column = 0; column < columns; column += kLanes) {
      const auto wide = static_cast<int>(std::min(kLanes, columns - column));
      float* tile = to + column * to_stride + row;
      const float* block = from + row * from_stride + column;
      if (tall == kLanes && wide == kLanes) {
        at::vec::transpose_mxn<float, static_cast<int>(kLanes), static_cast<int>(kLanes)>(block, from_stride, tile,
                                                                                          to_stride);
      } else {
        at::vec::transpose_mxn<float>(block, from_stride, tile, to_stride, tall, wide);
      }
      for (int j = 0; j < wide && scale != nullptr; ++j) {
        (Vec::loadu(tile + j * to_stride, tall) * Vec::loadu(scale + row, tall)).store(tile + j * to_stride, tall);
      }
    }
  }
}

void widen(const c10::BFloat16* from, int64_t count, float* to) {
  using BFloats = at::vec::Vectorized<c10::BFloat16>;
  for (int64_t i = 0; i < count; i += BFloats::size()) {
    const int64_t left = std::min<int64_t>(BFloats::size(), count - i);
    const BFloats loaded = left == BFloats::size() ? BFloats::loadu(from + i) : BFloats::loadu(from + i, left);
    const auto [low, high] = at::vec::convert_to_float<c10::BFloat16>(loaded);
    if (left == BFloats::size()) {
      low.store(to + i);
      high.store(to + i + kLanes);
    } else {
      low.store(to + i, static_cast<int>(std::min(left, kLanes)));
      high.store(to + i + kLanes, static_cast<int>(std::max<int64_t>(left - kLanes, 0)));
    }
  }
}

void narrow(const float* from, int64_t count, c10::BFloat16* to) {
  using BFloats = at::vec::Vectorized<c10::BFloat16>;
  int64_t i = 0;
  for (; i + BFloats::size() <= count; i += BFloats::size()) {
    at::vec::convert_from_float<c10::BFloat16>(Vec::loadu(from + i), Vec::loadu(from + i + kLanes)).store(to + i);
  }
  for (; i < count; ++i) {
    to[i] = from[i];
  }
}

void normalize(const float* x, int64_t count, float mean, float inverse, const float* weight, const float* bias,
               float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t some = std::min(kLanes, count - i);
    Vec value = (Vec::loadu(x + i, some) - Vec(mean)) * Vec(inverse);
    if (weight != nullptr) {
      value = value * Vec::loadu(weight + i, some);
    }
    if (bias != nullptr) {
      value = value + Vec::loadu(bias + i, some);
    }
    value.store(to + i, static_cast<int>(some));
  }
}

void residual_norm(const float* x, const float* residual, int64_t count, const float* weight, const float* bias,
                   float eps, float* sum, float* to) {
  const int64_t whole = count / kLanes * kLanes;
  const auto rest = static_cast<int>(count - whole);
  Vec total(0.0F);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec value = Vec::loadu(x + i) + Vec::loadu(residual + i);
    value.store(sum + i);
    total = total + value;
  }
  if (rest > 0) {  // lanes beyond the rest are 0
    const Vec value = Vec::loadu(x + whole, rest) + Vec::loadu(residual + whole, rest);
    value.store(sum + whole, rest);
    total = total + value;
  }
  const float mean = lane_sum(total) / static_cast<float>(count);
  Vec squares(0.0F);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec centered = Vec::loadu(sum + i) - Vec(mean);
    squares = at::vec::fmadd(centered, centered, squares);
  }
  float variance = lane_sum(squares);
  for (int64_t i = whole; i < count; ++i) {
    variance += (sum[i] - mean) * (sum[i] - mean);
  }
  variance /= static_cast<float>(count);
  normalize(sum, count, mean, 1.0F / std::sqrt(variance + eps), weight, bias, to);
}

// The formulas of activations/activation.cpp.
void activate(FusedActivation activation, float* values, int64_t count) {
  switch (activation) {
    case FusedActivation::kIdentity:
      return;
    case FusedActivation::kRelu:
      return map(values, count, [](const Vec& x) { return at::vec::maximum(x, Vec(0.0F)); });
    case FusedActivation::kSilu:
      return map(values, count, [](const Vec& x) { return x * sigmoid(x); });
    case FusedActivation::kGelu:
      return map(values, count,
                 [](const Vec& x) { return x * Vec(0.5F) * (Vec(1.0F) + (x * Vec(0.70710678118654752440F)).erf()); });
    case FusedActivation::kGeluTanh:
      return map(values, count, [](const Vec& x) {
        const Vec inner = Vec(0.79788456080286535588F) * (x + Vec(0.044715F) * x * x * x);
        return x * Vec(0.5F) * (Vec(1.0F) + inner.tanh());
      });
    case FusedActivation::kTanh:
      return map(values, count, [](const Vec& x) { return x.tanh(); });
    case FusedActivation::kSigmoid:
      return map(values, count, sigmoid);
  }
}

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
