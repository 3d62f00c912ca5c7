#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/lora_gradients.h>
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

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved = restore("gated_lora", ctx);
    const Selection& selection = saved.selection;
    variable_list result(kArgumentCount);
    result[kBase] = grads[0];
    if (selection.kind == Selection::Kind::kBase) {
      return result;
    }
    const variable_list& tensors = saved.tensors;
    const LoraArguments args{tensors[0], {},         tensors[1],
                             tensors[2], tensors[3], {tensors[4], tensors[5], {}, selection.adapter, {}}};
    const LoraNeeds needs{saved.needs(kX),       saved.needs(kLoraA),      saved.needs(kLoraB),
                          saved.needs(kScaling), saved.needs(kGateWeight), saved.needs(kGateBias)};
    const LoraGradients gradients =
        lora_backward(args, selection, saved.gate, /*hidden=*/tensors[6], grads[0], grads[1], needs, /*linear=*/{});
    result[kX] = gradients.x;
    result[kLoraA] = gradients.lora_a;
    result[kLoraB] = gradients.lora_b;
    result[kScaling] = gradients.scaling;
    result[kGateWeight] = gradients.gate_weight;
    result[kGateBias] = gradients.gate_bias;
    return result;
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
