#include <torchgraft/patch/module/drawn_weights.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/graft_options.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/sites/apply_sites.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

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

// Numbers that keep the size of what a matrix is multiplied with; biases are small. A large scaling must not drown the
// base.
at::Tensor drawn_weight(const at::Tensor& zeros, const std::string& key, double scaling) {
  const double width = zeros.dim() > 1 ? static_cast<double>(zeros.size(-1)) : 100.0;
  return drawn_like(zeros, key) / (std::sqrt(width) * std::max(1.0, scaling));
}

// The largest factor of what a module adds.
double scaling_of(const ModuleWeights& weights) {
  const auto found = weights.find("scaling");
  return found == weights.end() || found->second.numel() == 0 ? 1.0 : found->second.detach().abs().max().item<double>();
}

// The copy's own banks, which may be written. clone_module() copies buffers, but not the memory of parameters.
class OwnBanks {
 public:
  at::Tensor get(const Module& slot, const std::string& name) {
    at::Tensor bank = slot.attr(name).toTensor();
    const torch::jit::ClassType& type = *slot._ivalue()->type();
    if (type.is_parameter(type.getAttributeSlot(name)) && copied_.insert(bank.unsafeGetTensorImpl()).second) {
      bank.set_data(bank.detach().clone());
    }
    return bank.detach();
  }

 private:
  std::set<const c10::TensorImpl*> copied_;
};

bool is_dora(const PlannedModule& planned) {
  const auto* lora = std::get_if<PlannedLoRA>(&planned.method);
  return lora && lora_form(lora->config) == LoRAForm::kDora;
}

class AdapterDrawing {
 public:
  AdapterDrawing(Module adapters_module, const Adapter& adapter, OwnBanks& banks)
      : banks_(banks),
        adapters_module_(std::move(adapters_module)),
        index_(static_cast<int64_t>(find_adapter(adapters_module_, adapter.name, "verify"))),
        adapter_(adapter) {}

  bool draw() {
    for (size_t m = 0; m < adapter_.plan.size(); ++m) {
      const PlannedModule& planned = adapter_.plan[m];
      const std::string layer = "layer_" + std::to_string(planned.number);
      const std::string name = slot_name(adapter_, planned);
      const Module slot = adapters_module_.attr(layer).toModule().attr(name).toModule();
      const std::string path = adapter_.name + "." + layer + "." + name + ".";
      adapter_.trainable ? draw_own(slot, path, scaling_of(adapter_.weights[m])) : draw_row(slot, path, m);
    }
    for (const auto& container : adapters_module_.named_children()) {  // what trained weights are computed from
      if (container.name.ends_with(kSourceSuffix)) {
        draw_own(container.value, adapter_.name + "." + container.name + ".", 1.0);
      }
    }
    return has_drawn_;
  }

 private:
  // Draws what a trainable adapter has for itself in `parent`.
  void draw_own(const Module& parent, const std::string& path, double scaling) {
    const std::string name = own_module_name(adapter_.name);
    if (!parent.hasattr(name)) {
      return;
    }
    for (const auto& parameter : parent.attr(name).toModule().named_parameters()) {
      if (is_zero(parameter.value)) {
        at::Tensor tensor = parameter.value;
        tensor.set_data(drawn_weight(tensor, path + parameter.name, scaling));
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
        write(slot, name, drawn_weight(weight, path + name, scaling_of(weights)));
      }
    }
  }

  void write(const Module& slot, const std::string& name, const at::Tensor& value) {
    write_parameter(banks_.get(slot, name)[index_], name, value);
    has_drawn_ = true;
  }

  OwnBanks& banks_;
  Module adapters_module_;
  int64_t index_;
  const Adapter& adapter_;
  bool has_drawn_ = false;
};

}  // namespace

DrawnCopy with_drawn_weights(const Module& grafted, const std::vector<Adapter>& adapters) {
  const at::NoGradGuard no_grad;
  DrawnCopy result{clone_module(grafted)};
  OwnBanks banks;
  const Module adapters_module = result.module.attr("adapters").toModule();
  for (const Adapter& adapter : adapters) {
    const bool has_drawn = !adapter.merged && AdapterDrawing(adapters_module, adapter, banks).draw();
    result.has_drawn = result.has_drawn || has_drawn;
  }
  if (result.has_drawn && adapters_module.hasattr(std::string(kFoldedBuffer) + "0")) {  // it was computed from zeros
    result.module = build(open_grafted(result.module, "verify"), active_name(result.module));
  }
  return result;
}

DrawnCopy with_drawn_weights(const Module& grafted) {
  const CanonicalGraph canonical = canonicalise(grafted, "base_forward");
  const Structure structure = choose_sites(canonical, grafted, remembered_sites(grafted)).structure;
  return with_drawn_weights(grafted, read_adapters(grafted.attr("adapters").toModule(), structure));
}

}  // namespace torchgraft
