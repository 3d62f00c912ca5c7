#include <torchgraft/plan/lora_factors.h>

#include <ATen/ATen.h>

namespace torchgraft {
namespace {

const LoRAConfig* lora_config(const PlannedModule& module) {
  const auto* lora = std::get_if<PlannedLoRA>(&module.method);
  return lora ? &lora->config : nullptr;
}

}  // namespace

LoRAFactors lora_factors(const LoRAConfig& config) {
  return config.mtl_lora ? LoRAFactors::kMtlLora : config.vera_d ? LoRAFactors::kVera : LoRAFactors::kNone;
}

LoRAFactors lora_factors(const PlannedModule& module) {
  const LoRAConfig* config = lora_config(module);
  return config ? lora_factors(*config) : LoRAFactors::kNone;
}

std::string lora_factors_key(const PlannedModule& module) {
  return "layer_" + std::to_string(module.number) + "_" + module.site;
}

std::map<std::string, std::vector<int64_t>> own_factor_shapes(const PlannedModule& module) {
  const LoRAFactors factors = lora_factors(module);
  if (factors == LoRAFactors::kNone) {
    return {};
  }
  const auto& lora = std::get<PlannedLoRA>(module.method);
  const int64_t r = lora.config.r;
  const int64_t out = lora.out_features;
  if (factors == LoRAFactors::kVera) {
    return {{"vera_d", {r, r}}, {"vera_b", {out, out}}};
  }
  const int64_t n = lora.config.n_up_projection;
  return {{"task_b", {n, out, r}}, {"task_values", {r}}, {"task_weights", {n}}};
}

std::vector<std::string> factored_names(const PlannedModule& module) {
  switch (lora_factors(module)) {
    case LoRAFactors::kNone:
      return {};
    case LoRAFactors::kVera:
      return {"lora_a", "lora_b"};
    case LoRAFactors::kMtlLora:
      return {"lora_b"};
  }
  TORCH_INTERNAL_ASSERT(false, "unknown factors of a LoRA");
}

bool has_lora_factors(const PlannedModule& module, const Reparametrisation& sources) {
  return lora_factors(module) != LoRAFactors::kNone && sources.count(lora_factors_key(module)) > 0;
}

ModuleWeights factored_weights(const PlannedModule& module, const Reparametrisation& sources) {
  const ModuleWeights& own = sources.at(lora_factors_key(module));
  if (lora_factors(module) == LoRAFactors::kVera) {
    const ModuleWeights& shared = sources.at(kSharedVera);
    const at::Tensor right = at::matmul(shared.at("lora_B"), own.at("vera_d"));
    return {{"lora_a", shared.at("lora_A")}, {"lora_b", at::matmul(own.at("vera_b"), right)}};
  }
  const double sharpness = std::get<PlannedLoRA>(module.method).config.weights_sharpness;
  const at::Tensor shares = at::softmax(own.at("task_weights") / sharpness, 0);
  const at::Tensor sum = at::tensordot(shares, own.at("task_b"), {0}, {0});
  return {{"lora_b", sum * own.at("task_values")}};
}

void share_vera_matrix(const Plan& plan, AdapterWeights& weights) {
  at::Tensor shared;
  for (size_t m = 0; m < plan.size(); ++m) {
    if (lora_factors(plan[m]) == LoRAFactors::kVera) {
      at::Tensor& lora_a = weights[m].at("lora_a");
      shared = shared.defined() ? shared : lora_a;
      lora_a = shared;
    }
  }
}

void check_vera_shapes(const Plan& plan) {
  const PlannedModule* first = nullptr;
  const auto described = [](const PlannedModule& module) {
    const auto& lora = std::get<PlannedLoRA>(module.method);
    return c10::str(module.site, " of layer ", module.number, " from ", lora.in_features, " to ", lora.out_features);
  };
  for (const PlannedModule& module : plan) {
    if (lora_factors(module) != LoRAFactors::kVera) {
      continue;
    }
    first = first ? first : &module;
    const auto& [one, other] = std::pair(std::get<PlannedLoRA>(first->method), std::get<PlannedLoRA>(module.method));
    TORCH_CHECK(one.in_features == other.in_features && one.out_features == other.out_features,
                "plan: VeRA's random matrices are one pair for all projections, which must have one shape, but ",
                described(*first), " and ", described(module),
                " differ; ask for projections of one shape (attn_matrices, intermediate_lora, output_lora)");
  }
}

}  // namespace torchgraft
