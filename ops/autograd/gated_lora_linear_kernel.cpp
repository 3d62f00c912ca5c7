#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_lora_linear_kernel.h>
#include <torchgraft/ops/gated_lora_linear.h>

namespace torchgraft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positions of the tensor arguments, and of their gradients.
enum Argument : size_t { kX, kWeight, kBias, kLoraA, kLoraB, kScaling, kGateWeight, kGateBias, kArgumentCount = 11 };

class GatedLoraLinearFunction : public torch::autograd::Function<GatedLoraLinearFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
                               const at::Tensor& lora_b, const at::Tensor& scaling,
                               const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
                               const std::optional<at::Tensor>& adapter_ids,
                               const std::optional<at::Tensor>& token_mask, int64_t adapter) {
    const LoraArguments args{x,      {},      lora_a,
                             lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
    check(args, weight, or_undefined(bias));
    const Selection selection = resolve_selection("gated_lora_linear", args.rows, lora_a, /*recording=*/true);
    const LoraForward result = lora_linear_forward(args, weight, or_undefined(bias), selection);
    const at::Tensor gate = gate_result(result.gate, x, args.rows, selection);
    save(ctx, {x, weight, or_undefined(bias), lora_a, lora_b, scaling, args.rows.gate_weight, args.rows.gate_bias},
         {x, weight, lora_a, lora_b, scaling, args.rows.gate_weight, args.rows.gate_bias, result.hidden}, selection,
         result.gate);
    ctx->set_materialize_grads(false);
    if (!result.gate.value.defined()) {
      ctx->mark_non_differentiable({gate});
    }
    return {result.output, gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved = restore("gated_lora_linear", ctx);
    const Selection& selection = saved.selection;
    const variable_list& tensors = saved.tensors;
    variable_list result(kArgumentCount);
    if (grads[0].defined()) {
      through_projection(saved, grads[0], result);
    }
    const LinearGradient linear{grads[0], tensors[1]};
    if (selection.kind == Selection::Kind::kBase) {
      if (saved.needs(kX)) {
        result[kX] = input_gradient(selection, linear, {}, {});
      }
      return result;
    }
    const LoraArguments args{tensors[0], {},         tensors[2],
                             tensors[3], tensors[4], {tensors[5], tensors[6], {}, selection.adapter, {}}};
    const LoraNeeds needs{saved.needs(kX),       saved.needs(kLoraA),      saved.needs(kLoraB),
                          saved.needs(kScaling), saved.needs(kGateWeight), saved.needs(kGateBias)};
    const LoraGradients gradients =
        lora_backward(args, selection, saved.gate, /*hidden=*/tensors[7], grads[0], grads[1], needs, linear);
    result[kX] = gradients.x;
    result[kLoraA] = gradients.lora_a;
    result[kLoraB] = gradients.lora_b;
    result[kScaling] = gradients.scaling;
    result[kGateWeight] = gradients.gate_weight;
    result[kGateBias] = gradients.gate_bias;
    return result;
  }

 private:
  // Of weight and bias in x weight^T + bias; frozen ones have no gradient.
  static void through_projection(const Saved& saved, const at::Tensor& grad, variable_list& result) {
    const at::Tensor tokens = grad.flatten(0, 1);  // [B S, O]
    if (saved.needs(kWeight)) {
      result[kWeight] = at::mm(tokens.t(), saved.tensors[0].flatten(0, 1));
    }
    if (saved.needs(kBias)) {
      result[kBias] = tokens.sum(0);
    }
  }
};

std::tuple<at::Tensor, at::Tensor> gated_lora_linear_autograd(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({x, weight, or_undefined(bias), lora_a, lora_b, scaling, or_undefined(gate_weight),
                         or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_lora_linear(x, weight, bias, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter,
                             token_mask);
  }
  const variable_list result = GatedLoraLinearFunction::apply(x, weight, bias, lora_a, lora_b, scaling, gate_weight,
                                                              gate_bias, adapter_ids, token_mask, adapter);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_autograd)); }

}  // namespace
}  // namespace torchgraft::ops
