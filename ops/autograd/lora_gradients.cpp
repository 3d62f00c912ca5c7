#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/forward/gated_lora.h>

namespace torchgraft::ops {
namespace {

// What flows through the output, down to the narrow side.
struct ThroughOutput {
  at::Tensor hidden;  // [B, S, r]; undefined: not asked for
  at::Tensor gate;    // [B, 1]; undefined: not asked for
};

// With e = grad lora_b (undoing the up projection) and c = scaling g: the gradient of c is sum(e * hidden), of hidden
// c e. Fills in the gradients of lora_b and scaling.
ThroughOutput through_output(const LoraSaved& saved, const at::Tensor& grad, const LoraInputs<bool>& needs,
                             bool need_gate, LoraInputs<at::Tensor>& gradients) {
  const Selection& selection = saved.selection;
  const auto type = saved.x.scalar_type();
  const at::Tensor coefficient = lora_coefficient(saved.scaling, selection, saved.gate, type);
  const at::Tensor grad_scaled = narrow_product(selection, grad, select(selection, saved.lora_b));  // [B, S, r]
  ThroughOutput through;
  if (needs.lora_b) {
    const at::Tensor scaled = (saved.hidden * coefficient).to(type);
    gradients.lora_b = select_backward(selection, saved.lora_b, weight_gradient(selection, grad, scaled));
  }
  if (needs.lora_a || needs.x) {
    through.hidden = (grad_scaled * coefficient).to(type);
  }
  if (!need_gate && !needs.scaling) {
    return through;
  }
  const at::Tensor grad_coefficient =
      (grad_scaled * saved.hidden).sum(at::IntArrayRef{1, 2}, /*keepdim=*/false, accumulation_type(type));  // [B]
  if (needs.scaling) {
    const at::Tensor& gate = saved.gate.value;
    const at::Tensor per_row = gate.defined() ? grad_coefficient * gate.squeeze(1) : grad_coefficient;
    gradients.scaling = select_backward(selection, saved.scaling, reduce_rows(selection, per_row));
  }
  if (need_gate) {
    through.gate = (grad_coefficient * select(selection, saved.scaling)).unsqueeze(1);
  }
  return through;
}

}  // namespace

LoraInputs<at::Tensor> lora_backward(const LoraSaved& saved, const ResultGradients& grads,
                                     const LoraInputs<bool>& needs) {
  const LinearGradient linear = saved.weight.defined() ? LinearGradient{grads.output, saved.weight} : LinearGradient{};
  LoraInputs<at::Tensor> gradients;
  if (saved.selection.kind == Selection::Kind::kBase) {
    if (needs.x) {
      gradients.x = input_gradient(saved.selection, linear, {}, {});
    }
    return gradients;
  }
  const bool need_gate = saved.gate.value.defined() && (needs.x || needs.gate.any());
  ThroughOutput through;
  if (grads.output.defined()) {
    through = through_output(saved, grads.output, needs, need_gate, gradients);
  }
  TokenReads reads(saved.selection, saved.x);
  if (through.hidden.defined()) {
    reads.add(through.hidden, saved.lora_a, needs.lora_a, gradients.lora_a);
  }
  if (need_gate) {
    reads.add_gate(saved.gate, accumulate(through.gate, grads.gate), saved.gate_parameters, needs.gate, gradients.gate);
  }
  gradients.x = reads.backward(needs.x, linear);
  return gradients;
}

}  // namespace torchgraft::ops
