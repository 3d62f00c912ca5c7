#include <torchgraft/patch/insert/activation_source.h>

#include <torchgraft/ops/activation.h>

#include <c10/util/Exception.h>

#include <map>

namespace torchgraft {

// Names of one function share an entry in ops/activation.cpp.
std::string activation_source(const std::string& name) {
  static const std::map<std::string, std::string> kSources = {
      {"gelu", "torch.gelu(inner)"},
      {"gelu_10", "torch.clamp(torch.gelu(inner), -10.0, 10.0)"},
      {"gelu_accurate", "torch.gelu(inner, approximate=\"tanh\")"},
      {"gelu_fast", "torch.gelu(inner, approximate=\"tanh\")"},
      {"gelu_new", "torch.gelu(inner, approximate=\"tanh\")"},
      {"gelu_python", "torch.gelu(inner)"},
      {"gelu_python_tanh", "torch.gelu(inner, approximate=\"tanh\")"},
      {"gelu_pytorch_tanh", "torch.gelu(inner, approximate=\"tanh\")"},
      {"laplace", "0.5 * (1.0 + torch.erf((inner - 0.707107) / (0.282095 * 1.4142135623730951)))"},
      {"leaky_relu", "torch.leaky_relu(inner, 0.01)"},
      {"leakyrelu", "torch.leaky_relu(inner, 0.01)"},
      {"linear", "inner"},
      {"mish", "torch.mish(inner)"},
      {"quick_gelu", "inner * torch.sigmoid(1.702 * inner)"},
      {"relu", "torch.relu(inner)"},
      {"relu2", "torch.square(torch.relu(inner))"},
      {"relu6", "torch.clamp(inner, 0.0, 6.0)"},
      {"sigmoid", "torch.sigmoid(inner)"},
      {"silu", "torch.silu(inner)"},
      {"swish", "torch.silu(inner)"},
      {"tanh", "torch.tanh(inner)"}};
  const auto found = kSources.find(ops::find_activation(name).name);
  TORCH_INTERNAL_ASSERT(found != kSources.end(), "no source for the non-linearity ", name);
  return found->second;
}

}  // namespace torchgraft
