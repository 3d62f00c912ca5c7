#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_bottleneck_kernel.h>
#include <torchgraft/ops/gated_bottleneck.h>

namespace torchgraft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positions of the tensor arguments, and of their gradients.
enum Argument : size_t {
  kX,
  kResidual,
  kDownWeight,
  kDownBias,
  kUpWeight,
  kUpBias,
  kScaling,
  kGateWeight,
  kGateBias,
  kArgumentCount = 13
};

class GatedBottleneckFunction : public torch::autograd::Function<GatedBottleneckFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& residual,
                               const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight,
                               const at::Tensor& up_bias, const at::Tensor& scaling,
                               const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
                               const std::optional<at::Tensor>& adapter_ids,
                               const std::optional<at::Tensor>& token_mask, int64_t adapter,
                               const std::string& non_linearity) {
    const BottleneckArguments args =
        bottleneck_arguments(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                             row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask));
    check(args);
    const Selection selection = resolve_selection("gated_bottleneck", args.rows, down_weight, /*recording=*/true);
    const bool from_output = find_activation(non_linearity).saves_output;
    const BottleneckForward result = bottleneck_forward(args, selection, /*keep_inner=*/!from_output);
    const at::Tensor gate = gate_result(result.gate, x, args.rows, selection);
    save(ctx,
         {x, residual, down_weight, down_bias, up_weight, up_bias, scaling, args.rows.gate_weight, args.rows.gate_bias},
         {x, down_weight, down_bias, up_weight, up_bias, scaling, args.rows.gate_weight, args.rows.gate_bias,
          result.hidden, from_output ? at::Tensor() : result.inner},
         selection, result.gate);
    ctx->saved_data["non_linearity"] = non_linearity;
    ctx->set_materialize_grads(false);
    if (!result.gate.value.defined()) {
      ctx->mark_non_differentiable({gate});
    }
    return {result.output, gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved = restore("gated_bottleneck", ctx);
    const Selection& selection = saved.selection;
    variable_list result(kArgumentCount);
    result[kResidual] = grads[0];
    if (selection.kind == Selection::Kind::kBase) {
      return result;
    }
    const variable_list& tensors = saved.tensors;
    const BottleneckArguments args{tensors[0],
                                   {},
                                   tensors[1],
                                   tensors[2],
                                   tensors[3],
                                   tensors[4],
                                   tensors[5],
                                   ctx->saved_data["non_linearity"].toStringRef(),
                                   {tensors[6], tensors[7], {}, selection.adapter, {}}};
    const bool gated = saved.gate.value.defined();
    const bool need_gate = gated && saved.needs_any({kX, kGateWeight, kGateBias});
    TokenReads reads(selection, args.x);
    at::Tensor grad_gate;  // [B, 1]
    if (grads[0].defined()) {
      grad_gate = through_output(args, saved, grads[0], need_gate, reads, result);
    }
    if (need_gate) {
      reads.add_gate(saved.gate, accumulate(grad_gate, grads[1]), args.rows, saved.needs(kGateWeight),
                     saved.needs(kGateBias), result[kGateWeight], result[kGateBias]);
    }
    result[kX] = reads.backward(saved.needs(kX));
    return result;
  }

 private:
  // output = residual + g (f(inner) W^T + b) with W = scaling up_weight (row by row), b = scaling up_bias. Fills in
  // what flows through the output; returns the gate's gradient if it is needed. Nothing of x's size is formed but its
  // gradient.
  static at::Tensor through_output(const BottleneckArguments& args, const Saved& saved, const at::Tensor& grad,
                                   bool need_gate, TokenReads& reads, variable_list& result) {
    const Selection& selection = saved.selection;
    const at::Tensor& hidden = saved.tensors[8];
    const auto sum_type = accumulation_type(args.x.scalar_type());
    const at::Tensor scaling = select(selection, args.scaling);  // [(B,) 1] or [(B,) H]
    const bool need_narrow = saved.needs_any({kX, kDownWeight, kDownBias});
    at::Tensor grad_scaled;  // [B, S, R]: grad W
    if (need_gate || need_narrow) {
      grad_scaled = narrow_product(selection, grad, select(selection, args.up_weight) * scaling.unsqueeze(-1));
    }
    if (need_narrow) {
      down_gradients(args, saved, with_gate(saved, grad_scaled), reads, result);
    }
    const bool need_up = saved.needs_any({kUpWeight, kUpBias, kScaling});
    at::Tensor grad_sum;  // [B, H]: grad, summed over tokens
    if (need_up || need_gate) {
      grad_sum = grad.sum(at::IntArrayRef{1}, /*keepdim=*/false, sum_type);
    }
    if (need_up) {
      up_gradients(args, saved, scaling, grad, grad_sum, result);
    }
    if (!need_gate) {
      return {};
    }
    const at::Tensor on_weight = (grad_scaled * hidden).sum(at::IntArrayRef{1, 2}, /*keepdim=*/false, sum_type);
    const at::Tensor on_bias = (grad_sum * (scaling * select(selection, args.up_bias))).sum(-1);
    return (on_weight + on_bias).unsqueeze(1);
  }

  static at::Tensor with_gate(const Saved& saved, const at::Tensor& narrow) {
    return saved.gate.value.defined() ? (narrow * saved.gate.value.unsqueeze(-1)).to(narrow.scalar_type()) : narrow;
  }

  static void down_gradients(const BottleneckArguments& args, const Saved& saved, const at::Tensor& grad_hidden,
                             TokenReads& reads, variable_list& result) {
    const Selection& selection = saved.selection;
    const Activation& activation = find_activation(args.non_linearity);
    const at::Tensor grad_inner = activation.backward(grad_hidden, saved.tensors[activation.saves_output ? 8 : 9]);
    reads.add(grad_inner, args.down_weight, saved.needs(kDownWeight), result[kDownWeight]);
    if (saved.needs(kDownBias)) {
      const at::Tensor per_row =
          grad_inner.sum(at::IntArrayRef{1}, /*keepdim=*/false, accumulation_type(args.x.scalar_type()));
      result[kDownBias] = select_backward(selection, args.down_bias, reduce_rows(selection, per_row));
    }
  }

  // With M = grad^T (g hidden) and m = grad^T g: the gradients of up_weight, up_bias and scaling are scaling M,
  // scaling m and rowwise <M, up_weight> + m up_bias.
  static void up_gradients(const BottleneckArguments& args, const Saved& saved, const at::Tensor& scaling,
                           const at::Tensor& grad, const at::Tensor& grad_sum, variable_list& result) {
    const Selection& selection = saved.selection;
    const at::Tensor bias_part =  // [(B,) H]
        reduce_rows(selection, saved.gate.value.defined() ? grad_sum * saved.gate.value : grad_sum);
    at::Tensor weight_part;  // [(B,) H, R]
    if (saved.needs_any({kUpWeight, kScaling})) {
      weight_part = weight_gradient(selection, grad, with_gate(saved, saved.tensors[8]));
    }
    if (saved.needs(kUpWeight)) {
      result[kUpWeight] = select_backward(selection, args.up_weight, weight_part * scaling.unsqueeze(-1));
    }
    if (saved.needs(kUpBias)) {
      result[kUpBias] = select_backward(selection, args.up_bias, bias_part * scaling);
    }
    if (saved.needs(kScaling)) {
      const auto sum_type = accumulation_type(args.x.scalar_type());
      at::Tensor per_channel =
          (weight_part * select(selection, args.up_weight)).sum(at::IntArrayRef{-1}, /*keepdim=*/false, sum_type);
      per_channel = per_channel + bias_part * select(selection, args.up_bias);
      const bool one_for_all = TORCH_GUARD_OR_FALSE(args.scaling.sym_size(1).sym_eq(1));
      result[kScaling] =
          select_backward(selection, args.scaling, one_for_all ? per_channel.sum(-1, /*keepdim=*/true) : per_channel);
    }
  }
};

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_autograd(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({x, residual, down_weight, down_bias, up_weight, up_bias, scaling, or_undefined(gate_weight),
                         or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_bottleneck(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                            gate_weight, gate_bias, adapter_ids, adapter, token_mask);
  }
  const variable_list result =
      GatedBottleneckFunction::apply(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, gate_weight,
                                     gate_bias, adapter_ids, token_mask, adapter, std::string(non_linearity));
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("gated_bottleneck", TORCH_FN(gated_bottleneck_autograd)); }

}  // namespace
}  // namespace torchgraft::ops
