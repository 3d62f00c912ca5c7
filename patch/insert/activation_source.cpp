#include <torchgraft/patch/insert/activation_source.h>

#include <torchgraft/activations/activation.h>

#include <c10/util/Exception.h>

namespace torchgraft {

std::string activation_source(const std::string& name) {
  switch (find_activation(name).function) {
    case NonLinearity::kGelu:
      return "torch.gelu(inner)";
    case NonLinearity::kGeluClipped:
      return "torch.clamp(torch.gelu(inner), -10.0, 10.0)";
    case NonLinearity::kGeluTanh:
      return "torch.gelu(inner, approximate=\"tanh\")";
    case NonLinearity::kIdentity:
      return "inner";
    case NonLinearity::kLaplace:
      return "0.5 * (1.0 + torch.erf((inner - 0.707107) / (0.282095 * 1.4142135623730951)))";
    case NonLinearity::kLeakyRelu:
      return "torch.leaky_relu(inner, 0.01)";
    case NonLinearity::kMish:
      return "torch.mish(inner)";
    case NonLinearity::kQuickGelu:
      return "inner * torch.sigmoid(1.702 * inner)";
    case NonLinearity::kRelu:
      return "torch.relu(inner)";
    case NonLinearity::kRelu2:
      return "torch.square(torch.relu(inner))";
    case NonLinearity::kRelu6:
      return "torch.clamp(inner, 0.0, 6.0)";
    case NonLinearity::kSigmoid:
      return "torch.sigmoid(inner)";
    case NonLinearity::kSilu:
      return "torch.silu(inner)";
    case NonLinearity::kTanh:
      return "torch.tanh(inner)";
  }
  TORCH_INTERNAL_ASSERT(false, "no source for the non-linearity ", name);
}

}  // namespace torchgraft
