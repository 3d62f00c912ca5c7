#include <torchgraft/patch/module/drawn_weights.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/module/graft_options.h>
#include <torchgraft/patch/sites/apply_sites.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <functional>

namespace torchgraft {
namespace {

using torch::jit::Module;

bool is_zero(const at::Tensor& tensor) {
  return tensor.numel() > 0 && at::isFloatingType(tensor.scalar_type()) && !tensor.any().item<bool>();
}

at::Tensor drawn_like(const at::Tensor& tensor, const std::string& key) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(std::hash<std::string>()(key));
  return at::randn(tensor.sizes(), generator, at::TensorOptions(at::kDouble)).to(tensor.options().requires_grad(false));
}

// Numbers that keep the size of what a matrix is multiplied with; biases are small.
at::Tensor drawn_weight(const at::Tensor& zeros, const std::string& key) {
  const double width = zeros.dim() > 1 ? static_cast<double>(zeros.size(-1)) : 100.0;
  return drawn_like(zeros, key) / std::sqrt(width);
}

bool is_dora(const PlannedModule& planned) {
  const auto* lora = std::get_if<PlannedLoRA>(&planned.method);
  return lora && lora_form(lora->config) == LoRAForm::kDora;
}

class AdapterDrawing {
 public:
  AdapterDrawing(Module adapters_module, const Adapter& adapter)
      : adapters_module_(std::move(adapters_module)),
        index_(static_cast<int64_t>(find_adapter(adapters_module_, adapter.name, "verify"))),
        adapter_(adapter) {}

  bool draw() {
    for (size_t m = 0; m < adapter_.plan.size(); ++m) {
      const PlannedModule& planned = adapter_.plan[m];
      const std::string layer = "layer_" + std::to_string(planned.number);
      const std::string name = slot_name(adapter_, planned);
      const Module slot = adapters_module_.attr(layer).toModule().attr(name).toModule();
      const std::string path = adapter_.name + "." + layer + "." + name + ".";
      adapter_.trainable ? draw_own(slot, path) : draw_row(slot, path, m);
    }
    for (const auto& container : adapters_module_.named_children()) {  // what trained weights are computed from
      if (container.name.ends_with(kSourceSuffix)) {
        draw_own(container.value, adapter_.name + "." + container.name + ".");
      }
    }
    return has_drawn_;
  }

 private:
  // Draws what a trainable adapter has for itself in `parent`.
  void draw_own(const Module& parent, const std::string& path) {
    const std::string name = own_module_name(adapter_.name);
    if (!parent.hasattr(name)) {
      return;
    }
    for (const auto& parameter : parent.attr(name).toModule().named_parameters()) {
      if (is_zero(parameter.value)) {
        at::Tensor tensor = parameter.value;
        tensor.set_data(drawn_weight(tensor, path + parameter.name));
        has_drawn_ = true;
      }
    }
  }

  void draw_row(const Module& slot, const std::string& path, size_t m) {
    const PlannedModule& planned = adapter_.plan[m];
    const ModuleWeights& weights = adapter_.weights[m];
    if (is_dora(planned)) {
      if (is_zero(weights.at("lora_b"))) {
        const at::Tensor magnitude = slot.attr("magnitude").toTensor().detach()[index_];
        write(slot, "magnitude", magnitude * (1.0 + drawn_like(magnitude, path + "magnitude") / 4));
      }
      return;
    }
    for (const auto& [name, weight] : weights) {
      if (is_trained(name, planned) && is_zero(weight)) {
        write(slot, name, drawn_weight(weight, path + name));
      }
    }
  }

  void write(const Module& slot, const std::string& name, const at::Tensor& value) {
    at::Tensor parameter = slot.attr(name).toTensor();
    const at::Tensor bank = parameter.detach().clone();
    write_parameter(bank[index_], name, value);
    parameter.set_data(bank);
    has_drawn_ = true;
  }

  Module adapters_module_;
  int64_t index_;
  const Adapter& adapter_;
  bool has_drawn_ = false;
};

}  // namespace

DrawnCopy with_drawn_weights(const Module& grafted, const std::vector<Adapter>& adapters) {
  const at::NoGradGuard no_grad;
  DrawnCopy result{clone_module(grafted)};
  for (const Adapter& adapter : adapters) {
    const bool has_drawn = !adapter.merged && AdapterDrawing(result.module.attr("adapters").toModule(), adapter).draw();
    result.has_drawn = result.has_drawn || has_drawn;
  }
  return result;
}

DrawnCopy with_drawn_weights(const Module& grafted) {
  const CanonicalGraph canonical = canonicalise(grafted, "base_forward");
  const Structure structure = choose_sites(canonical, grafted, remembered_sites(grafted)).structure;
  return with_drawn_weights(grafted, read_adapters(grafted.attr("adapters").toModule(), structure));
}

}  // namespace torchgraft
