#include <torchgraft/patch/module/merge.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <map>

namespace torchgraft {
namespace {

// Why no weight can hold `module`; empty when one can.
std::string obstacle(const PlannedModule& module) {
  if (std::holds_alternative<PlannedBottleneck>(module.method)) {
    return "a bottleneck adapter has a non-linearity";
  }
  if (std::holds_alternative<PlannedPrefix>(module.method)) {
    return "a prefix adds keys and values";
  }
  if (std::holds_alternative<PlannedInvertible>(module.method)) {
    return "an invertible adapter has non-linearities";
  }
  if (std::holds_alternative<PlannedPrompt>(module.method)) {
    return "a prompt adds tokens";
  }
  if (std::holds_alternative<PlannedReft>(module.method)) {
    return "ReFT changes some tokens only";
  }
  const LoRAConfig& config = std::get<PlannedLoRA>(module.method).config;
  if (lora_form(config) != LoRAForm::kAdd) {
    return lora_form(config) == LoRAForm::kScale ? "(IA)^3 scales the projection's bias too"
                                                 : "DoRA scales the projection's bias too";
  }
  if (config.lora_bias) {
    return "it has a bias of its own";
  }
  return config.use_gating ? "its gate depends on the input" : "";
}

}  // namespace

void check_can_merge(const Adapter& adapter) {
  TORCH_CHECK(!adapter.trainable, "merge_adapter: '", adapter.name,
              "' is trainable, and would go on changing; freeze it first");
  for (const PlannedModule& module : adapter.plan) {
    const std::string reason = obstacle(module);
    TORCH_CHECK(reason.empty(), "merge_adapter: '", adapter.name, "' cannot be merged: no weight can hold ",
                module.location, " of layer ", module.number, ", because ", reason,
                "; only ungated LoRA can be merged");
  }
}

void move_into_base(Adapter& adapter, const std::vector<MergePlace>& places, bool merge) {
  at::NoGradGuard no_grad;
  std::map<const c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> sums;  // weight and its new value
  for (const MergePlace& place : places) {
    const at::Tensor& tensor = place.weight.tensor;
    auto& [weight, sum] = sums[tensor.unsafeGetTensorImpl()];
    if (!weight.defined()) {
      weight = tensor;
      sum = tensor.detach().to(at::kDouble);
      sum = sum.is_set_to(tensor) ? sum.clone() : sum;
    }
    const ModuleWeights& weights = adapter.weights[place.module];
    const double scaling = lora_scaling(std::get<PlannedLoRA>(adapter.plan[place.module].method).config);
    const at::Tensor update = at::matmul(weights.at("lora_b").to(at::kDouble), weights.at("lora_a").to(at::kDouble));
    place.weight.rows(sum, place.site, update.size(0)).add_(update, merge ? scaling : -scaling);
  }
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const double scaling = lora_scaling(std::get<PlannedLoRA>(adapter.plan[m].method).config);
    at::Tensor& held = adapter.weights[m].at("scaling");
    held = at::full_like(held, merge ? 0.0 : scaling);
  }
  for (auto& [impl, pair] : sums) {
    auto& [weight, sum] = pair;
    weight.set_data(sum.to(weight.scalar_type()).contiguous());
  }
  adapter.merged = merge;
}

}  // namespace torchgraft
