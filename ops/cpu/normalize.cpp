#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/normalize.h>

namespace torchgraft::ops::cpu {

at::Tensor normalize(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& weight,
                     const at::Tensor& bias) {
  constexpr int64_t kRowsPerTask = 32;
  const at::Tensor from = x.contiguous();
  const at::Tensor means = mean.contiguous();
  const at::Tensor inverses = inverse.contiguous();
  const at::Tensor weights = weight.defined() ? weight.contiguous() : weight;
  const at::Tensor biases = bias.defined() ? bias.contiguous() : bias;
  at::Tensor result = at::empty(x.sizes(), x.options());
  const int64_t rows = means.numel();
  const int64_t features = rows == 0 ? 0 : from.numel() / rows;
  const auto* values = from.const_data_ptr<float>();
  const auto* centers = means.const_data_ptr<float>();
  const auto* factors = inverses.const_data_ptr<float>();
  const auto* scales = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  const auto* shifts = biases.defined() ? biases.const_data_ptr<float>() : nullptr;
  auto* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels().normalize(values + row * features, features, centers[row], factors[row], scales, shifts,
                          to + row * features);
    }
  });
  return result;
}

}  // namespace torchgraft::ops::cpu
