#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/gated_lora.h>
#include <torchgraft/ops/gated_lora.h>

#include <array>

namespace torchgraft::ops {
namespace {

struct LoraGradient {
  using Arguments = LoraArguments;
  using Saved = LoraSaved;

  template <typename Value>
  struct Inputs {
    Value base{};
    LoraInputs<Value> lora{};
    std::array<Value*, 7> all() {
      return {&base, &lora.x, &lora.lora_a, &lora.lora_b, &lora.scaling, &lora.gate.weight, &lora.gate.bias};
    }
  };

  static Inputs<at::Tensor> inputs(const Arguments& args) { return {.base = args.base, .lora = lora_inputs(args)}; }

  static Recorded<Saved> forward(const Arguments& args) {
    check(args);
    const Selection selection = resolve_selection(args.kOperator, args.rows, args.lora_a, /*recording=*/true);
    const LoraForward result = lora_forward(args, selection);
    return {.output = result.output,
            .gate = gate_result(result.gate, args.x, args.rows, selection),
            .saved = lora_saved(args, result, selection)};
  }

  static Inputs<at::Tensor> backward(const Saved& saved, const ResultGradients& grads, const Inputs<bool>& needs) {
    return {.base = grads.output, .lora = lora_backward(saved, grads, needs.lora)};
  }
};

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_lora", autograd_kernel<LoraArguments, gated_lora, GradientNode<LoraGradient>::record>);
}

}  // namespace
}  // namespace torchgraft::ops
