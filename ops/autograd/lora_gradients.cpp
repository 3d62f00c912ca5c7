#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/composite/gated_lora_kernel.h>

namespace torchgraft::ops {
namespace {

// What flows through the output, down to the narrow side.
struct ThroughOutput {
  at::Tensor hidden;  // [B, S, r]
  at::Tensor gate;    // [B, 1]; undefined: not asked for
};

// With e = grad lora_b (undoing the up projection) and c = scaling g: the gradient of c is sum(e * hidden), of hidden
// c e.
ThroughOutput through_output(const LoraArguments& args, const Selection& selection, const Gate& gate,
                             const at::Tensor& hidden, const at::Tensor& grad, const LoraNeeds& needs, bool need_gate,
                             LoraGradients& result) {
  const auto type = args.x.scalar_type();
  const at::Tensor coefficient = lora_coefficient(args, selection, gate);
  const at::Tensor grad_scaled = narrow_product(selection, grad, select(selection, args.lora_b));  // [B, S, r]
  ThroughOutput through;
  if (needs.lora_b) {
    const at::Tensor scaled = (hidden * coefficient).to(type);
    result.lora_b = select_backward(selection, args.lora_b, weight_gradient(selection, grad, scaled));
  }
  if (needs.lora_a || needs.x) {
    through.hidden = (grad_scaled * coefficient).to(type);
  }
  if (!need_gate && !needs.scaling) {
    return through;
  }
  const at::Tensor grad_coefficient =
      (grad_scaled * hidden).sum(at::IntArrayRef{1, 2}, /*keepdim=*/false, accumulation_type(type));  // [B]
  if (needs.scaling) {
    const at::Tensor per_row = gate.value.defined() ? grad_coefficient * gate.value.squeeze(1) : grad_coefficient;
    result.scaling = select_backward(selection, args.scaling, reduce_rows(selection, per_row));
  }
  if (need_gate) {
    through.gate = (grad_coefficient * select(selection, args.scaling)).unsqueeze(1);
  }
  return through;
}

}  // namespace

LoraGradients lora_backward(const LoraArguments& args, const Selection& selection, const Gate& gate,
                            const at::Tensor& hidden, const at::Tensor& grad, const at::Tensor& grad_gate,
                            const LoraNeeds& needs, const LinearGradient& linear) {
  const bool need_gate = gate.value.defined() && (needs.x || needs.gate_weight || needs.gate_bias);
  LoraGradients result;
  ThroughOutput through;
  if (grad.defined()) {
    through = through_output(args, selection, gate, hidden, grad, needs, need_gate, result);
  }
  TokenReads reads(selection, args.x);
  if (through.hidden.defined()) {
    reads.add(through.hidden, args.lora_a, needs.lora_a, result.lora_a);
  }
  if (need_gate) {
    reads.add_gate(gate, accumulate(through.gate, grad_gate), args.rows, needs.gate_weight, needs.gate_bias,
                   result.gate_weight, result.gate_bias);
  }
  result.x = reads.backward(needs.x, linear);
  return result;
}

}  // namespace torchgraft::ops
