#include <torchgraft/patch/adapters/mean_adapter.h>

#include <torchgraft/patch/adapters/adapter_bank.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace torchgraft {
namespace {

// In float64.
at::Tensor weighted_sum(const std::vector<Adapter>& sources, const std::vector<double>& shares, size_t module,
                        const std::string& parameter) {
  at::Tensor total;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor part = sources[i].weights[module].at(parameter).detach().to(at::kDouble) * shares[i];
    total = total.defined() ? total + part : part;
  }
  return total;
}

// The distance of 1 and the next number.
double rounding_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 0x1p-52;
    case at::kFloat:
      return 0x1p-23;
    case at::kHalf:
      return 0x1p-10;
    default:
      return 0x1p-7;
  }
}

}  // namespace

Adapter mean_adapter(const std::vector<Adapter>& sources, const std::vector<double>& shares) {
  const at::NoGradGuard no_grad;
  Adapter mean = sources.front();
  mean.trainable = false;
  mean.sources.clear();
  mean.head.reset();
  for (size_t m = 0; m < mean.weights.size(); ++m) {
    mean.weights[m].erase("weight_norm");
    for (auto& [parameter, tensor] : mean.weights[m]) {
      // alpha / r is no parameter: all sources have the same, and weights that do not sum to 1 must not change it.
      tensor = is_trained(parameter, mean.plan[m])
                   ? weighted_sum(sources, shares, m, parameter).to(tensor.scalar_type())
                   : tensor;
    }
  }
  return mean;
}

void check_is_mean(const Adapter& mean, const std::vector<Adapter>& sources, const std::vector<double>& shares) {
  const at::NoGradGuard no_grad;
  for (size_t m = 0; m < mean.weights.size(); ++m) {
    for (const auto& [parameter, tensor] : mean.weights[m]) {
      if (!is_trained(parameter, mean.plan[m])) {
        continue;
      }
      const at::Tensor expected = weighted_sum(sources, shares, m, parameter);
      const double rounding = rounding_of(tensor.scalar_type());
      const bool is_mean =
          expected.sizes() == tensor.sizes() &&
          at::allclose(tensor.to(at::kDouble), expected, rounding, rounding * 1e-3, /*equal_nan=*/true);
      TORCH_CHECK(is_mean, "average_adapter: ", parameter, " of ", mean.plan[m].location, " in layer ",
                  mean.plan[m].number, " of '", mean.name, "' is not the mean of the adapters'. Nothing was changed; ",
                  "please report the model. verify=False does without");
    }
  }
}

}  // namespace torchgraft
