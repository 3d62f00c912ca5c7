#include <torchgraft/patch/graph/activation_source.h>

#include <torchgraft/activations/activation.h>
#include <torchgraft/activations/constants.h>
#include <torchgraft/patch/graph/source_parts.h>

#include <c10/util/Exception.h>

#include <numbers>

namespace torchgraft {

std::string activation_source(const std::string& name) {
  switch (find_activation(name).function) {
    case NonLinearity::kGelu:
      return "torch.gelu(inner)";
    case NonLinearity::kGeluClipped:
      return "torch.clamp(torch.gelu(inner), " + number_source(-kGeluClip) + ", " + number_source(kGeluClip) + ")";
    case NonLinearity::kGeluTanh:
      return "torch.gelu(inner, approximate=\"tanh\")";
    case NonLinearity::kIdentity:
      return "inner";
    case NonLinearity::kLaplace:
      return "0.5 * (1.0 + torch.erf((inner - " + number_source(kLaplaceMean) + ") / " +
             number_source(kLaplaceDeviation * std::numbers::sqrt2) + "))";
    case NonLinearity::kLeakyRelu:
      return "torch.leaky_relu(inner, " + number_source(kLeakySlope) + ")";
    case NonLinearity::kMish:
      return "torch.mish(inner)";
    case NonLinearity::kQuickGelu:
      return "inner * torch.sigmoid(" + number_source(kQuickGeluSlope) + " * inner)";
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
