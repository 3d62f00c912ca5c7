#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/gated_lora_linear.h>
#include <torchgraft/ops/gated_lora.h>

#include <array>

namespace torchgraft::ops {
namespace {

struct LoraLinearGradient {
  using Arguments = LoraLinearArguments;
  using Saved = LoraSaved;

  template <typename Value>
  struct Inputs {
    Value weight{};
    Value bias{};
    LoraInputs<Value> lora{};
    std::array<Value*, 8> all() {
      return {&weight, &bias, &lora.x, &lora.lora_a, &lora.lora_b, &lora.scaling, &lora.gate.weight, &lora.gate.bias};
    }
  };

  static Inputs<at::Tensor> inputs(const Arguments& args) {
    return {.weight = args.weight, .bias = args.bias, .lora = lora_inputs(args)};
  }

  static Recorded<Saved> forward(const Arguments& args) {
    check(args);
    const Selection selection = resolve_selection(args.kOperator, args.rows, args.lora_a, /*recording=*/true);
    const LoraForward result = lora_linear_forward(args, selection);
    return {.output = result.output,
            .gate = gate_result(result.gate, args.x, args.rows, selection),
            .saved = lora_saved(args, result, selection, args.weight)};
  }

  static Inputs<at::Tensor> backward(const Saved& saved, const ResultGradients& grads, const Inputs<bool>& needs) {
    Inputs<at::Tensor> gradients{.lora = lora_backward(saved, grads, needs.lora)};
    if (grads.output.defined() && (needs.weight || needs.bias)) {
      const at::Tensor tokens = grads.output.flatten(0, 1);  // [B S, O]
      if (needs.weight) {
        gradients.weight = at::mm(tokens.t(), saved.x.flatten(0, 1));
      }
      if (needs.bias) {
        gradients.bias = tokens.sum(0);
      }
    }
    return gradients;
  }
};

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_lora_linear",
         autograd_kernel<LoraLinearArguments, gated_lora_linear, GradientNode<LoraLinearGradient>::record>);
}

}  // namespace
}  // namespace torchgraft::ops
