#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/activations/constants.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <numbers>

namespace torchgraft {
namespace {

using at::Tensor;

Tensor relu(const Tensor& input) { return at::relu(input); }
Tensor relu_grad(const Tensor& grad, const Tensor& output) { return at::threshold_backward(grad, output, 0); }

Tensor relu2(const Tensor& input) { return at::square(at::relu(input)); }
Tensor relu2_grad(const Tensor& grad, const Tensor& input) { return grad * at::relu(input) * 2; }

Tensor relu6(const Tensor& input) { return at::clamp(input, 0, 6); }
Tensor relu6_grad(const Tensor& grad, const Tensor& input) { return at::hardtanh_backward(grad, input, 0, 6); }

Tensor leaky_relu(const Tensor& input) { return at::leaky_relu(input, kLeakySlope); }
Tensor leaky_relu_grad(const Tensor& grad, const Tensor& output) {
  return at::leaky_relu_backward(grad, output, kLeakySlope, /*self_is_result=*/true);
}

Tensor gelu_erf(const Tensor& input) { return at::gelu(input); }
Tensor gelu_erf_grad(const Tensor& grad, const Tensor& input) { return at::gelu_backward(grad, input); }

Tensor gelu_tanh(const Tensor& input) { return at::gelu(input, "tanh"); }
Tensor gelu_tanh_grad(const Tensor& grad, const Tensor& input) { return at::gelu_backward(grad, input, "tanh"); }

Tensor gelu_clipped(const Tensor& input) { return at::clamp(at::gelu(input), -kGeluClip, kGeluClip); }
Tensor gelu_clipped_grad(const Tensor& grad, const Tensor& input) {
  // GELU stays above -0.17, so only the upper bound ever clips.
  return at::gelu_backward(grad.masked_fill(at::gelu(input) > kGeluClip, 0), input);
}

Tensor quick_gelu(const Tensor& input) { return input * at::sigmoid(input * kQuickGeluSlope); }
Tensor quick_gelu_grad(const Tensor& grad, const Tensor& input) {
  const Tensor gate = at::sigmoid(input * kQuickGeluSlope);
  return grad * gate * (1 + kQuickGeluSlope * input * (1 - gate));
}

Tensor silu(const Tensor& input) { return at::silu(input); }
Tensor silu_grad(const Tensor& grad, const Tensor& input) { return at::silu_backward(grad, input); }

Tensor mish(const Tensor& input) { return at::mish(input); }
Tensor mish_grad(const Tensor& grad, const Tensor& input) { return at::mish_backward(grad, input); }

Tensor tanh(const Tensor& input) { return at::tanh(input); }
Tensor tanh_grad(const Tensor& grad, const Tensor& output) { return at::tanh_backward(grad, output); }

Tensor sigmoid(const Tensor& input) { return at::sigmoid(input); }
Tensor sigmoid_grad(const Tensor& grad, const Tensor& output) { return at::sigmoid_backward(grad, output); }

Tensor laplace(const Tensor& input) {
  return 0.5 * (1 + at::erf((input - kLaplaceMean) / (kLaplaceDeviation * std::numbers::sqrt2)));
}
Tensor laplace_grad(const Tensor& grad, const Tensor& input) {
  const double peak = 0.5 * std::numbers::inv_sqrtpi * std::numbers::sqrt2 / kLaplaceDeviation;
  return grad * peak * at::exp(-0.5 * at::square((input - kLaplaceMean) / kLaplaceDeviation));
}

Tensor identity(const Tensor& input) { return input; }
Tensor identity_grad(const Tensor& grad, const Tensor&) { return grad; }

constexpr std::array kActivations = {
    Activation{"gelu", NonLinearity::kGelu, gelu_erf, gelu_erf_grad, /*saves_output=*/false},
    Activation{"gelu_10", NonLinearity::kGeluClipped, gelu_clipped, gelu_clipped_grad, /*saves_output=*/false},
    Activation{"gelu_accurate", NonLinearity::kGeluTanh, gelu_tanh, gelu_tanh_grad, /*saves_output=*/false},
    Activation{"gelu_fast", NonLinearity::kGeluTanh, gelu_tanh, gelu_tanh_grad, /*saves_output=*/false},
    Activation{"gelu_new", NonLinearity::kGeluTanh, gelu_tanh, gelu_tanh_grad, /*saves_output=*/false},
    Activation{"gelu_python", NonLinearity::kGelu, gelu_erf, gelu_erf_grad, /*saves_output=*/false},
    Activation{"gelu_python_tanh", NonLinearity::kGeluTanh, gelu_tanh, gelu_tanh_grad, /*saves_output=*/false},
    Activation{"gelu_pytorch_tanh", NonLinearity::kGeluTanh, gelu_tanh, gelu_tanh_grad, /*saves_output=*/false},
    Activation{"laplace", NonLinearity::kLaplace, laplace, laplace_grad, /*saves_output=*/false},
    Activation{"leaky_relu", NonLinearity::kLeakyRelu, leaky_relu, leaky_relu_grad, /*saves_output=*/true},
    Activation{"leakyrelu", NonLinearity::kLeakyRelu, leaky_relu, leaky_relu_grad, /*saves_output=*/true},
    Activation{"linear", NonLinearity::kIdentity, identity, identity_grad, /*saves_output=*/true},
    Activation{"mish", NonLinearity::kMish, mish, mish_grad, /*saves_output=*/false},
    Activation{"quick_gelu", NonLinearity::kQuickGelu, quick_gelu, quick_gelu_grad, /*saves_output=*/false},
    Activation{"relu", NonLinearity::kRelu, relu, relu_grad, /*saves_output=*/true},
    Activation{"relu2", NonLinearity::kRelu2, relu2, relu2_grad, /*saves_output=*/false},
    Activation{"relu6", NonLinearity::kRelu6, relu6, relu6_grad, /*saves_output=*/false},
    Activation{"sigmoid", NonLinearity::kSigmoid, sigmoid, sigmoid_grad, /*saves_output=*/true},
    Activation{"silu", NonLinearity::kSilu, silu, silu_grad, /*saves_output=*/false},
    Activation{"swish", NonLinearity::kSilu, silu, silu_grad, /*saves_output=*/false},
    Activation{"tanh", NonLinearity::kTanh, tanh, tanh_grad, /*saves_output=*/true},
};

}  // namespace

const Activation& find_activation(std::string_view name, const char* op) {
  const auto same = [name](const Activation& activation) {
    const std::string_view known = activation.name;
    return known.size() == name.size() && std::equal(known.begin(), known.end(), name.begin(), [](char a, char b) {
             return a == static_cast<char>(std::tolower(static_cast<unsigned char>(b)));
           });
  };
  const auto found = std::find_if(kActivations.begin(), kActivations.end(), same);
  TORCH_CHECK(found != kActivations.end(), op, ": expected non_linearity to be one of ",
              c10::Join(", ", non_linearity_names()), ", got \"", name, "\"");
  return *found;
}

const std::vector<std::string>& non_linearity_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> result;
    for (const Activation& activation : kActivations) {
      result.emplace_back(activation.name);
    }
    return result;
  }();
  return names;
}

}  // namespace torchgraft
