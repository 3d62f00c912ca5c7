#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_lora_kernel.h>
#include <torchgraft/ops/gated_lora.h>

namespace torchgraft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positions of the tensor arguments, and of their gradients.
enum Argument : size_t { kX, kBase, kLoraA, kLoraB, kScaling, kGateWeight, kGateBias, kArgumentCount = 10 };

class GatedLoraFunction : public torch::autograd::Function<GatedLoraFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& base,
                               const at::Tensor& lora_a, const at::Tensor& lora_b, const at::Tensor& scaling,
                               const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
                               const std::optional<at::Tensor>& adapter_ids,
                               const std::optional<at::Tensor>& token_mask, int64_t adapter) {
    const LoraArguments args{x,      base,    lora_a,
                             lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
    check(args);
    const Selection selection = resolve_selection("gated_lora", args.rows, lora_a, /*recording=*/true);
    const LoraForward result = lora_forward(args, selection);
    const at::Tensor gate = gate_result(result.gate, x, args.rows, selection);
    save(ctx, {x, base, lora_a, lora_b, scaling, args.rows.gate_weight, args.rows.gate_bias},
         {x, lora_a, lora_b, scaling, args.rows.gate_weight, args.rows.gate_bias, result.hidden}, selection,
         result.gate);
    ctx->set_materialize_grads(false);
    if (!result.gate.value.defined()) {
      ctx->mark_non_differentiable({gate});
    }
    return {result.output, gate};
  }

  // With e = grad lora_b (undoing the up projection) and c = scaling g: the gradient of c is sum(e * hidden), of hidden
  // c e; the rest are products with x and hidden. Nothing wider than r columns is formed but the gradient of x.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved = restore("gated_lora", ctx);
    const Selection& selection = saved.selection;
    variable_list result(kArgumentCount);
    result[kBase] = grads[0];
    if (selection.kind == Selection::Kind::kBase) {
      return result;
    }
    const LoraArguments args{saved.tensors[0], {},
                             saved.tensors[1], saved.tensors[2],
                             saved.tensors[3], {saved.tensors[4], saved.tensors[5], {}, selection.adapter, {}}};
    const bool gated = saved.gate.value.defined();
    const bool need_gate = gated && saved.needs_any({kX, kGateWeight, kGateBias});
    at::Tensor grad_gate;  // [B, 1]
    if (grads[0].defined()) {
      grad_gate = through_output(args, saved, grads[0], need_gate, result);
    }
    if (need_gate) {
      grad_gate = accumulate(grad_gate, grads[1]);
    }
    if (need_gate && grad_gate.defined()) {
      const GateGradients gate =
          gate_backward(saved.gate, grad_gate, args.x, args.rows.gate_weight, args.rows.gate_bias, selection,
                        saved.needs(kX), saved.needs(kGateWeight), saved.needs(kGateBias));
      result[kX] = accumulate(result[kX], gate.x);
      result[kGateWeight] = gate.weight;
      result[kGateBias] = gate.bias;
    }
    return result;
  }

 private:
  // Fills in what flows through the output; returns the gate's gradient if it is needed.
  static at::Tensor through_output(const LoraArguments& args, const Saved& saved, const at::Tensor& grad,
                                   bool need_gate, variable_list& result) {
    const Selection& selection = saved.selection;
    const at::Tensor& hidden = saved.tensors[6];
    const auto type = args.x.scalar_type();
    const at::Tensor coefficient = lora_coefficient(args, selection, saved.gate);
    const at::Tensor grad_scaled = at::matmul(grad, select(selection, args.lora_b));  // [B, S, r]
    if (saved.needs(kLoraB)) {
      const at::Tensor scaled = (hidden * coefficient).to(type);
      result[kLoraB] = select_backward(selection, args.lora_b, weight_gradient(selection, grad, scaled));
    }
    if (saved.needs_any({kLoraA, kX})) {
      const at::Tensor grad_hidden = (grad_scaled * coefficient).to(type);
      if (saved.needs(kLoraA)) {
        result[kLoraA] = select_backward(selection, args.lora_a, weight_gradient(selection, grad_hidden, args.x));
      }
      if (saved.needs(kX)) {
        result[kX] = at::matmul(grad_hidden, select(selection, args.lora_a));
      }
    }
    if (!need_gate && !saved.needs(kScaling)) {
      return {};
    }
    const at::Tensor grad_coefficient =
        (grad_scaled * hidden).sum(at::IntArrayRef{1, 2}, /*keepdim=*/false, accumulation_type(type));  // [B]
    if (saved.needs(kScaling)) {
      const at::Tensor per_row =
          saved.gate.value.defined() ? grad_coefficient * saved.gate.value.squeeze(1) : grad_coefficient;
      result[kScaling] = select_backward(selection, args.scaling, reduce_rows(selection, per_row));
    }
    return need_gate ? (grad_coefficient * select(selection, args.scaling)).unsqueeze(1) : at::Tensor();
  }
};

std::tuple<at::Tensor, at::Tensor> gated_lora_autograd(
    const at::Tensor& x, const at::Tensor& base, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({x, base, lora_a, lora_b, scaling, or_undefined(gate_weight), or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_lora(x, base, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
  }
  const variable_list result = GatedLoraFunction::apply(x, base, lora_a, lora_b, scaling, gate_weight, gate_bias,
                                                        adapter_ids, token_mask, adapter);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("gated_lora", TORCH_FN(gated_lora_autograd)); }

}  // namespace
}  // namespace torchgraft::ops
