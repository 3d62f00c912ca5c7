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

}  // namespace torchgraft
