#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/normalize.h>

namespace torchgraft::ops::cpu {
namespace {

constexpr int64_t kRowsPerTask = 32;

const float* data_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

}  // namespace

at::Tensor normalize(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& weight,
                     const at::Tensor& bias) {
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
  const auto* scales = data_of(weights);
  const auto* shifts = data_of(biases);
  auto* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels().normalize(values + row * features, features, centers[row], factors[row], scales, shifts,
                          to + row * features);
    }
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& residual,
                                                 const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const at::Tensor weights = weight.defined() ? weight.contiguous() : weight;
  const at::Tensor biases = bias.defined() ? bias.contiguous() : bias;
  at::Tensor output = at::empty(x.sizes(), x.options());
  at::Tensor sum = at::empty(x.sizes(), x.options());
  const int64_t features = x.size(-1);
  const auto* values = data_of(x);
  const auto* residuals = data_of(residual);
  const auto* scales = data_of(weights);
  const auto* shifts = data_of(biases);
  auto* sums = sum.mutable_data_ptr<float>();
  auto* to = output.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel() / features, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * features; i < end * features; i += features) {
      kernels().residual_norm(values + i, residuals + i, features, scales, shifts, static_cast<float>(eps), sums + i,
                              to + i);
    }
  });
  return {output, sum};
}

}  // namespace torchgraft::ops::cpu
