#include <torchgraft/plan/reparametrisation.h>

#include <ATen/ATen.h>

namespace torchgraft {

Reparametrisation converted(Reparametrisation sources, const at::TensorOptions& options) {
  std::erase_if(sources, [](const auto& entry) { return entry.second.empty(); });
  for (auto& [place, weights] : sources) {
    for (auto& [name, tensor] : weights) {
      tensor = tensor.to(options);
    }
  }
  return sources;
}

void convert(ModuleWeights& weights, const at::TensorOptions& options) {
  for (auto& [name, tensor] : weights) {
    const at::ScalarType own = tensor.scalar_type();
    tensor = tensor.to(at::isFloatingType(own) ? options : options.dtype(own));
  }
}

bool is_trained_source(const std::string& name) { return !name.starts_with("base_"); }

}  // namespace torchgraft
