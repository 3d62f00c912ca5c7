#include <torchgraft/patch/adapters/mean_adapter.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/plan/lora_factors.h>

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

// What `module` computes from the means of the sources' factors.
ModuleWeights mean_of_factors(const std::vector<Adapter>& sources, const std::vector<double>& shares,
                              const PlannedModule& module) {
  Reparametrisation mean;
  for (const std::string& key : {lora_factors_key(module), std::string(kSharedVera)}) {
    for (size_t i = 0; i < sources.size(); ++i) {
      TORCH_CHECK(has_lora_factors(module, sources[i].sources), "average_adapter: '", sources[i].name,
                  "' is VeRA or MTL-LoRA, whose average is that of its factors, and they were dropped when it was "
                  "frozen; load the adapters as trainable ones (trainable=True)");
      const auto found = sources[i].sources.find(key);
      for (const auto& [name, factor] : found == sources[i].sources.end() ? ModuleWeights() : found->second) {
        const at::Tensor part = factor.detach().to(at::kDouble) * shares[i];
        at::Tensor& total = mean[key][name];
        total = total.defined() ? total + part : part;
      }
    }
  }
  return factored_weights(module, mean);
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
    const PlannedModule& module = mean.plan[m];
    if (lora_factors(module) != LoRAFactors::kNone) {
      for (const auto& [parameter, tensor] : mean_of_factors(sources, shares, module)) {
        mean.weights[m][parameter] = tensor.to(sources.front().weights[m].at(parameter).scalar_type());
      }
    }
  }
  share_vera_matrix(mean.plan, mean.weights);
  return mean;
}

void check_is_mean(const Adapter& mean, const std::vector<Adapter>& sources, const std::vector<double>& shares) {
  const at::NoGradGuard no_grad;
  for (size_t m = 0; m < mean.weights.size(); ++m) {
    const bool is_factored = lora_factors(mean.plan[m]) != LoRAFactors::kNone;
    ModuleWeights factored = is_factored ? mean_of_factors(sources, shares, mean.plan[m]) : ModuleWeights();
    for (const auto& [parameter, tensor] : mean.weights[m]) {
      if (!is_trained(parameter, mean.plan[m])) {
        continue;
      }
      const at::Tensor expected =
          factored.count(parameter) ? factored.at(parameter) : weighted_sum(sources, shares, m, parameter);
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
