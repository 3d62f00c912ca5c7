#include <torchgraft/patch/pool/row_size.h>

#include <torchgraft/patch/adapters/adapter_bank.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <set>

namespace torchgraft {
namespace {

double product(std::initializer_list<int64_t> sizes) {
  double result = 1;
  for (const int64_t size : sizes) {
    result *= static_cast<double>(size);
  }
  return result;
}

double least_numbers(const PlannedModule& module) {
  if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    const bool has_no_own_matrix = lora_form(lora->config) == LoRAForm::kScale || shares_lora_a(module);
    const int64_t in = has_no_own_matrix ? 0 : lora->in_features;
    return product({lora->config.r, in + lora->out_features});
  }
  if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    return product({2, bottleneck->hidden_size, bottleneck->bottleneck_size});
  }
  if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
    return product({invertible->embedding_size, invertible->f_size + invertible->g_size});
  }
  if (const auto* prompt = std::get_if<PlannedPrompt>(&module.method)) {
    return product({prompt->config.prompt_length, prompt->embedding_size});
  }
  if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
    return product({2, reft_units(reft->config), reft->config.r, reft->hidden_size});
  }
  const auto& prefix = std::get<PlannedPrefix>(module.method);
  return product({2, prefix.num_kv_heads, prefix.head_dim, prefix.config.prefix_length});
}

}  // namespace

void check_row_limit(double bytes, int64_t limit) {
  TORCH_CHECK(limit == 0 || bytes <= static_cast<double>(limit), "AdapterPool: expected adapters of at most ", limit,
              " bytes each, rows for these need ",
              bytes < 1e15 ? std::to_string(static_cast<int64_t>(bytes)) : "far more",
              "; raise max_row_bytes, or use smaller adapters");
}

double least_bytes(const Plan& plan, const at::TensorOptions& options) {
  double numbers = 0;
  for (const PlannedModule& module : plan) {
    numbers += least_numbers(module);
  }
  return numbers * static_cast<double>(options.dtype().itemsize());
}

void check_least_bytes(const Plan& plan, const at::TensorOptions& options, int64_t limit) {
  check_row_limit(least_bytes(plan, options), limit);
}

void RowSize::add(const Adapter& adapter) {
  const auto grow = [&](const std::string& slot, const std::string& name, at::IntArrayRef sizes, size_t element_size) {
    Parameter& parameter = parameters_[slot + "." + name];
    parameter.element_size = static_cast<double>(element_size);
    parameter.sizes.resize(std::max(parameter.sizes.size(), sizes.size()), 0);
    for (size_t i = 0; i < sizes.size(); ++i) {
      parameter.sizes[i] = std::max(parameter.sizes[i], sizes[i]);
    }
  };
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const PlannedModule& module = adapter.plan[m];
    const std::string slot = std::to_string(module.number) + "." + slot_name(module);
    for (const auto& [name, value] : adapter.weights[m]) {
      grow(slot, name, value.sizes(), value.element_size());
    }
    if (shares_lora_a(module)) {
      parameters_.at(slot + ".lora_a").sharers.push_back(adapters_);
    }
    const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
    const auto* lora = std::get_if<PlannedLoRA>(&module.method);
    if (std::holds_alternative<PlannedInvertible>(module.method)) {
      grow(slot, "present", {}, sizeof(bool));
    } else if (std::holds_alternative<PlannedPrefix>(module.method)) {
      grow(slot, "prefix_length", {}, sizeof(int64_t));
    } else if (std::holds_alternative<PlannedPrompt>(module.method)) {
      grow(slot, "prompt_length", {}, sizeof(int64_t));
      grow(slot, "prompt_begin", {}, sizeof(int64_t));
    } else if (!bottleneck && !lora) {
      continue;
    } else if (bottleneck ? !bottleneck_form(*bottleneck).is_plain() : lora_form(lora->config) != LoRAForm::kAdd) {
      grow(slot, "present", {}, sizeof(bool));
    }
  }
  ++adapters_;
}

double RowSize::bytes() const {
  double result = 0;
  std::set<std::vector<size_t>> counted;
  for (const auto& [name, parameter] : parameters_) {
    if (!parameter.sharers.empty() && !counted.insert(parameter.sharers).second) {
      continue;
    }
    double numbers = 1;
    for (const int64_t size : parameter.sizes) {
      numbers *= static_cast<double>(size);
    }
    result += numbers * parameter.element_size;
  }
  return result;
}

}  // namespace torchgraft
