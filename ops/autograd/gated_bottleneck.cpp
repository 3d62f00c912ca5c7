#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/autograd/gated_bottleneck.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/gated_bottleneck.h>
#include <torchgraft/ops/gated_bottleneck.h>

#include <array>

namespace torchgraft::ops {
namespace {

struct BottleneckGradient {
  using Arguments = BottleneckArguments;

  template <typename Value>
  struct Inputs {
    Value x{};
    Value residual{};
    Value down_weight{};
    Value down_bias{};
    Value up_weight{};
    Value up_bias{};
    Value scaling{};
    GateInputs<Value> gate{};
    std::array<Value*, 9> all() {
      return {&x, &residual, &down_weight, &down_bias, &up_weight, &up_bias, &scaling, &gate.weight, &gate.bias};
    }
  };
  using Gradients = Inputs<at::Tensor>;
  using Needs = Inputs<bool>;

  struct Saved {
    at::Tensor x;            // [B, S, H]
    at::Tensor down_weight;  // [N, R, H]
    at::Tensor down_bias;    // [N, R]
    at::Tensor up_weight;    // [N, H, R]
    at::Tensor up_bias;      // [N, H]
    at::Tensor scaling;      // [N, 1] or [N, H]
    std::string non_linearity;
    GateParameters gate_parameters;
    at::Tensor hidden;      // [B, S, R]: the non-linearity's output; undefined for a base selection
    at::Tensor activation;  // [B, S, R]: what the non-linearity's gradient reads, its input or its output
    Selection selection;
    Gate gate;

    std::vector<at::Tensor*> tensors() {
      return {&x, &down_weight, &down_bias, &up_weight, &up_bias, &scaling, &hidden, &activation};
    }

    // g narrow of narrow [B, S, R], in its dtype.
    at::Tensor gated(const at::Tensor& narrow) const {
      return gate.value.defined() ? (narrow * gate.value.unsqueeze(-1)).to(narrow.scalar_type()) : narrow;
    }
  };

  static Inputs<at::Tensor> inputs(const Arguments& args) {
    return {.x = args.x,
            .residual = args.residual,
            .down_weight = args.down_weight,
            .down_bias = args.down_bias,
            .up_weight = args.up_weight,
            .up_bias = args.up_bias,
            .scaling = args.scaling,
            .gate = {args.rows.gate.weight, args.rows.gate.bias}};
  }

  static Recorded<Saved> forward(const Arguments& args) {
    check(args);
    const Selection selection = resolve_selection(args.kOperator, args.rows, args.down_weight, /*recording=*/true);
    const bool from_output = find_activation(args.non_linearity).saves_output;
    const BottleneckForward result = bottleneck_forward(args, selection, /*keep_inner=*/!from_output);
    return {.output = result.output,
            .gate = gate_result(result.gate, args.x, args.rows, selection),
            .saved = {.x = args.x,
                      .down_weight = args.down_weight,
                      .down_bias = args.down_bias,
                      .up_weight = args.up_weight,
                      .up_bias = args.up_bias,
                      .scaling = args.scaling,
                      .non_linearity = args.non_linearity,
                      .gate_parameters = args.rows.gate,
                      .hidden = result.hidden,
                      .activation = from_output ? result.hidden : result.inner,
                      .selection = selection,
                      .gate = result.gate}};
  }

  static Gradients backward(const Saved& saved, const ResultGradients& grads, const Needs& needs) {
    Gradients gradients{.residual = grads.output};
    if (saved.selection.kind == Selection::Kind::kBase) {
      return gradients;
    }
    const bool need_gate = saved.gate.value.defined() && (needs.x || needs.gate.any());
    TokenReads reads(saved.selection, saved.x);
    at::Tensor grad_gate;  // [B, 1]
    if (grads.output.defined()) {
      grad_gate = through_output(saved, grads.output, needs, need_gate, reads, gradients);
    }
    if (need_gate) {
      reads.add_gate(saved.gate, accumulate(grad_gate, grads.gate), saved.gate_parameters, needs.gate, gradients.gate);
    }
    gradients.x = reads.backward(needs.x);
    return gradients;
  }

 private:
  // output = residual + g (f(inner) W^T + b) with W = scaling up_weight (row by row), b = scaling up_bias. Fills in
  // what flows through the output; returns the gate's gradient if it is needed. Nothing of x's size is formed but its
  // gradient.
  static at::Tensor through_output(const Saved& saved, const at::Tensor& grad, const Needs& needs, bool need_gate,
                                   TokenReads& reads, Gradients& gradients) {
    const Selection& selection = saved.selection;
    const auto sum_type = accumulation_type(saved.x.scalar_type());
    const at::Tensor scaling = select(selection, saved.scaling);  // [(B,) 1] or [(B,) H]
    const bool need_narrow = needs.x || needs.down_weight || needs.down_bias;
    at::Tensor grad_scaled;  // [B, S, R]: grad W
    if (need_gate || need_narrow) {
      grad_scaled = narrow_product(selection, grad, select(selection, saved.up_weight) * scaling.unsqueeze(-1));
    }
    if (need_narrow) {
      down_gradients(saved, saved.gated(grad_scaled), needs, reads, gradients);
    }
    const bool need_up = needs.up_weight || needs.up_bias || needs.scaling;
    at::Tensor grad_sum;  // [B, H]: grad, summed over tokens
    if (need_up || need_gate) {
      grad_sum = grad.sum(at::IntArrayRef{1}, /*keepdim=*/false, sum_type);
    }
    if (need_up) {
      up_gradients(saved, scaling, grad, grad_sum, needs, gradients);
    }
    if (!need_gate) {
      return {};
    }
    const at::Tensor on_weight = (grad_scaled * saved.hidden).sum(at::IntArrayRef{1, 2}, /*keepdim=*/false, sum_type);
    const at::Tensor on_bias = (grad_sum * (scaling * select(selection, saved.up_bias))).sum(-1);
    return (on_weight + on_bias).unsqueeze(1);
  }

  static void down_gradients(const Saved& saved, const at::Tensor& grad_hidden, const Needs& needs, TokenReads& reads,
                             Gradients& gradients) {
    const at::Tensor grad_inner = find_activation(saved.non_linearity).backward(grad_hidden, saved.activation);
    reads.add(grad_inner, saved.down_weight, needs.down_weight, gradients.down_weight);
    if (needs.down_bias) {
      const at::Tensor per_row =
          grad_inner.sum(at::IntArrayRef{1}, /*keepdim=*/false, accumulation_type(saved.x.scalar_type()));
      gradients.down_bias = select_backward(saved.selection, saved.down_bias, reduce_rows(saved.selection, per_row));
    }
  }

  // With M = grad^T (g hidden) and m = grad^T g: the gradients of up_weight, up_bias and scaling are scaling M,
  // scaling m and rowwise <M, up_weight> + m up_bias. scaling: as selected; grad_sum [B, H]: grad, summed over tokens.
  static void up_gradients(const Saved& saved, const at::Tensor& scaling, const at::Tensor& grad,
                           const at::Tensor& grad_sum, const Needs& needs, Gradients& gradients) {
    const Selection& selection = saved.selection;
    const at::Tensor& gate = saved.gate.value;
    const at::Tensor bias_part =  // [(B,) H]
        reduce_rows(selection, gate.defined() ? grad_sum * gate : grad_sum);
    at::Tensor weight_part;  // [(B,) H, R]
    if (needs.up_weight || needs.scaling) {
      weight_part = weight_gradient(selection, grad, saved.gated(saved.hidden));
    }
    if (needs.up_weight) {
      gradients.up_weight = select_backward(selection, saved.up_weight, weight_part * scaling.unsqueeze(-1));
    }
    if (needs.up_bias) {
      gradients.up_bias = select_backward(selection, saved.up_bias, bias_part * scaling);
    }
    if (needs.scaling) {
      const auto sum_type = accumulation_type(saved.x.scalar_type());
      at::Tensor per_channel =
          (weight_part * select(selection, saved.up_weight)).sum(at::IntArrayRef{-1}, /*keepdim=*/false, sum_type);
      per_channel = per_channel + bias_part * select(selection, saved.up_bias);
      const bool one_for_all = TORCH_GUARD_OR_FALSE(saved.scaling.sym_size(1).sym_eq(1));
      gradients.scaling =
          select_backward(selection, saved.scaling, one_for_all ? per_channel.sum(-1, /*keepdim=*/true) : per_channel);
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> record_bottleneck(const BottleneckArguments& args) {
  return GradientNode<BottleneckGradient>::record(args);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_bottleneck", autograd_kernel<BottleneckArguments, gated_bottleneck, record_bottleneck>);
}

}  // namespace torchgraft::ops
