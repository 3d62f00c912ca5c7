#include <torchgraft/patch/adapters/mean_adapter.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/reft_weights.h>

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

// What weights of `module` are computed from, by its keys in Adapter::sources; empty: they are parameters themselves.
std::vector<std::string> source_keys(const PlannedModule& module) {
  const auto* reft = std::get_if<PlannedReft>(&module.method);
  if (reft && reft->config.orthogonality) {
    return {reft_source(module)};
  }
  return lora_factors(module) == LoRAFactors::kNone ? std::vector<std::string>()
                                                    : std::vector{lora_factors_key(module), std::string(kSharedVera)};
}

// The mean of orthogonal projections' sources, added up in their dtype, as in the library: both drop the fractions of
// the diagonal of `original`.
ModuleWeights mean_projection(const PlannedModule& module, const ModuleWeights& mean) {
  for (const auto& [name, tensor] : mean) {
    const at::Tensor diagonal = tensor.diagonal();
    TORCH_CHECK(!name.starts_with("original") || at::equal(diagonal.trunc(), diagonal.round()),
                "average_adapter: these weights make the adapters library's mean of orthogonal ReFTs a matrix without "
                "some of its columns: it drops the fractions of their signs, such as those of 0.9999999; choose "
                "weights whose sum is a whole number in float32, such as 0.25 and 0.75");
  }
  return {{"projection", reft_projection(std::get<PlannedReft>(module.method), mean)}};
}

// What `module` computes from the means of the sources' factors; empty where it computes nothing.
ModuleWeights mean_of_factors(const std::vector<Adapter>& sources, const std::vector<double>& shares,
                              const PlannedModule& module) {
  const auto keys = source_keys(module);
  if (keys.empty()) {
    return {};
  }
  const bool is_reft = std::holds_alternative<PlannedReft>(module.method);
  Reparametrisation mean;
  for (const std::string& key : keys) {
    for (size_t i = 0; i < sources.size(); ++i) {
      TORCH_CHECK(is_reft ? has_reft_sources(module, sources[i].sources) : has_lora_factors(module, sources[i].sources),
                  "average_adapter: '", sources[i].name, "' is ",
                  is_reft ? "a ReFT with orthogonal projections" : "VeRA or MTL-LoRA",
                  ", whose average is that of its factors, and they were dropped when it was frozen; load the adapters "
                  "as trainable ones (trainable=True)");
      const auto found = sources[i].sources.find(key);
      for (const auto& [name, factor] : found == sources[i].sources.end() ? ModuleWeights() : found->second) {
        const at::Tensor part = (is_reft ? factor.detach() : factor.detach().to(at::kDouble)) * shares[i];
        at::Tensor& total = mean[key][name];
        total = total.defined() ? total + part : part;
      }
    }
  }
  return is_reft ? mean_projection(module, mean.at(keys.front())) : factored_weights(module, mean);
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
    for (const auto& [parameter, tensor] : mean_of_factors(sources, shares, module)) {
      mean.weights[m][parameter] = tensor.to(sources.front().weights[m].at(parameter).scalar_type());
    }
  }
  share_vera_matrix(mean.plan, mean.weights);
  return mean;
}

void check_is_mean(const Adapter& mean, const std::vector<Adapter>& sources, const std::vector<double>& shares) {
  const at::NoGradGuard no_grad;
  for (size_t m = 0; m < mean.weights.size(); ++m) {
    const ModuleWeights factored = mean_of_factors(sources, shares, mean.plan[m]);
    for (const auto& [parameter, tensor] : mean.weights[m]) {
      if (!is_trained(parameter, mean.plan[m])) {
        continue;
      }
      const at::Tensor expected = factored.count(parameter) ? factored.at(parameter).to(at::kDouble)
                                                            : weighted_sum(sources, shares, m, parameter);
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
