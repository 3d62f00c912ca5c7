#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>
#include <torchgraft/ops/attention.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/prefix_attention_gradient.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positions of the tensor arguments, and of their gradients.
enum Argument : size_t {
  kQuery,
  kKey,
  kValue,
  kX,
  kPrefixKey,
  kPrefixValue,
  kAttnMask,
  kGateWeight,
  kGateBias,
  kArgumentCount = 16
};

class GatedPrefixAttentionFunction : public torch::autograd::Function<GatedPrefixAttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const at::Tensor& x, const at::Tensor& prefix_key,
                               const at::Tensor& prefix_value, const std::optional<at::Tensor>& attn_mask,
                               const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
                               const at::Tensor& prefix_length, const std::optional<at::Tensor>& adapter_ids,
                               const std::optional<at::Tensor>& token_mask, int64_t adapter, bool is_causal,
                               std::optional<double> scale, bool enable_gqa) {
    const PrefixArguments args{query,
                               key,
                               value,
                               x,
                               prefix_key,
                               prefix_value,
                               prefix_length,
                               or_undefined(attn_mask),
                               /*dropout_p=*/0.0,
                               is_causal,
                               scale,
                               enable_gqa,
                               row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
    const Selection selection = resolve_selection("gated_prefix_attention", args.rows, prefix_key, /*recording=*/true);
    TORCH_INTERNAL_ASSERT(selection.kind != Selection::Kind::kBase, "plain attention takes another path");
    const Gate gate = gate_forward(x, args.rows, selection);
    const Prefix prefix = select_prefix(args, selection, gate, /*trim=*/false);
    const AttentionForward attention = attend(args, prefix, additive_mask(args));
    const at::Tensor returned_gate = gate_result(gate, x, args.rows, selection);
    save(ctx,
         {query, key, value, x, prefix_key, prefix_value, args.attn_mask, args.rows.gate_weight, args.rows.gate_bias},
         {query, key, value, x, prefix_key, prefix_value, args.attn_mask, args.rows.gate_weight, args.rows.gate_bias,
          prefix_length, attention.output, attention.log_sum_exp},
         selection, gate);
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["enable_gqa"] = enable_gqa;
    ctx->set_materialize_grads(false);
    if (!gate.value.defined()) {
      ctx->mark_non_differentiable({returned_gate});
    }
    return {attention.output, returned_gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved = restore("gated_prefix_attention", ctx);
    const variable_list& tensors = saved.tensors;
    const PrefixArguments args{tensors[0],
                               tensors[1],
                               tensors[2],
                               tensors[3],
                               tensors[4],
                               tensors[5],
                               tensors[9],
                               tensors[6],
                               /*dropout_p=*/0.0,
                               ctx->saved_data["is_causal"].toBool(),
                               ctx->saved_data["scale"].toOptional<double>(),
                               ctx->saved_data["enable_gqa"].toBool(),
                               {tensors[7], tensors[8], {}, saved.selection.adapter, {}}};
    variable_list result(kArgumentCount);
    const bool need_gate = saved.gate.value.defined() && saved.needs_any({kX, kGateWeight, kGateBias});
    at::Tensor grad_gate;  // [B, G]
    if (grads[0].defined() && takes_fused(args, saved, grads[0])) {
      grad_gate = through_fused(args, saved, grads[0], need_gate, result);
    } else if (grads[0].defined()) {
      const Incoming incoming = receive(args, saved, grads[0]);
      grad_gate = through_prefix(args, saved, incoming, need_gate, result);
      through_sequence(args, saved, incoming, result);
    }
    if (need_gate) {
      TokenReads reads(saved.selection, args.x);
      reads.add_gate(saved.gate, accumulate(grad_gate, grads[1]), args.rows, saved.needs(kGateWeight),
                     saved.needs(kGateBias), result[kGateWeight], result[kGateBias]);
      result[kX] = reads.backward(saved.needs(kX));
    }
    return result;
  }

 private:
  // Whether probabilities can be made again of the scores and the saved log-sum-exp, block by block.
  static bool can_use_log_sum_exp(const PrefixArguments& args, const Saved& saved, const at::Tensor& grad) {
    const at::Tensor& log_sum_exp = saved.tensors[11];
    return log_sum_exp.defined() && !saved.needs(kAttnMask) && can_use_flash(args) && !at::isTensorSubclassLike(grad) &&
           is_precise(log_sum_exp);
  }

  static bool takes_fused(const PrefixArguments& args, const Saved& saved, const at::Tensor& grad) {
    return takes_fused_gradients(args.query, grad) && can_use_log_sum_exp(args, saved, grad);
  }

  // Prefix and sequence by one kernel. Returns the gate's gradient if it is needed.
  static at::Tensor through_fused(const PrefixArguments& args, const Saved& saved, const at::Tensor& grad,
                                  bool need_gate, variable_list& result) {
    const Selection& selection = saved.selection;
    const Prefix prefix = select_prefix(args, selection, saved.gate, /*trim=*/false);
    const cpu::AttentionGradients gradients =
        cpu::attend_backward(args, prefix, additive_mask(args), {saved.tensors[10], saved.tensors[11]}, grad,
                             saved.needs(kKey), saved.needs(kValue));
    result[kQuery] = gradients.query;
    result[kKey] = gradients.key;
    result[kValue] = gradients.value;
    const auto of_prefix = [&](const at::Tensor& gated, const at::Tensor& gate, const at::Tensor& bank) {
      return select_backward(selection, bank, reduce_rows(selection, apply_gate(gated, gate)));
    };
    if (saved.needs(kPrefixKey)) {
      result[kPrefixKey] = of_prefix(gradients.prefix_key, prefix.key_gate, args.prefix_key);
    }
    if (saved.needs(kPrefixValue)) {
      result[kPrefixValue] = of_prefix(gradients.prefix_value, prefix.value_gate, args.prefix_value);
    }
    if (!need_gate) {
      return {};
    }
    const at::Tensor grad_gate = at::zeros_like(saved.gate.value);
    grad_gate.select(1, 0).add_((gradients.prefix_key * prefix.key).sum(at::IntArrayRef{1, 2, 3}));
    grad_gate.select(1, -1).add_((gradients.prefix_value * prefix.value).sum(at::IntArrayRef{1, 2, 3}));
    return grad_gate;
  }

  // The gradient of the output and what both parts need of the forward computation.
  struct Incoming {
    at::Tensor grad;   // [B, h, S, d]
    at::Tensor delta;  // [B, h, S, 1]: <grad, output>, the softmax's mean of its own gradient
    at::Tensor mask;   // additive_mask
    Prefix prefix;
    at::Tensor similarities;      // [B, h, S, P]
    bool flash;                   // the sequence part's gradient is left to torch's kernel
    Probabilities probabilities;  // when flash: those of the prefix only
  };

  static Incoming receive(const PrefixArguments& args, const Saved& saved, const at::Tensor& grad) {
    const at::Tensor& output = saved.tensors[10];
    const at::Tensor& log_sum_exp = saved.tensors[11];
    Incoming incoming;
    incoming.grad = grad;
    incoming.delta =
        (grad * output).sum(at::IntArrayRef{-1}, /*keepdim=*/true, accumulation_type(args.query.scalar_type()));
    incoming.mask = additive_mask(args);
    incoming.prefix = select_prefix(args, saved.selection, saved.gate, /*trim=*/false);
    incoming.similarities = prefix_similarities(args, incoming.prefix);
    incoming.flash = can_use_log_sum_exp(args, saved, grad);
    const at::Tensor scores = prefix_scores(incoming.prefix, incoming.similarities);
    if (incoming.flash) {
      incoming.probabilities.prefix = at::exp(scores - log_sum_exp.unsqueeze(-1));
    } else {
      incoming.probabilities = joint_softmax(sequence_scores(args, incoming.mask), scores);
    }
    return incoming;
  }

  // With r = scale query prefix_key^T, p = softmax(g_k r, ...) and z = grad prefix_value^T, the gradient of the
  // prefix's scores is p (g_v z - delta). Returns the gate's gradient if it is needed.
  static at::Tensor through_prefix(const PrefixArguments& args, const Saved& saved, const Incoming& incoming,
                                   bool need_gate, variable_list& result) {
    const bool need_scores = saved.needs_any({kQuery, kPrefixKey}) || need_gate;
    if (!need_scores && !saved.needs(kPrefixValue)) {
      return {};
    }
    const Selection& selection = saved.selection;
    const auto type = args.query.scalar_type();
    const Prefix& prefix = incoming.prefix;
    const at::Tensor& probabilities = incoming.probabilities.prefix;
    if (saved.needs(kPrefixValue)) {
      const at::Tensor per_row =
          contract_queries(args, apply_gate(probabilities, prefix.value_gate).to(type), incoming.grad);
      result[kPrefixValue] = select_backward(selection, args.prefix_value, reduce_rows(selection, per_row));
    }
    if (!need_scores) {
      return {};
    }
    const at::Tensor on_values =
        times_keys(args, incoming.grad, prefix.value.transpose(-1, -2)).to(probabilities.scalar_type());
    const at::Tensor grad_scores = probabilities * (apply_gate(on_values, prefix.value_gate) - incoming.delta);
    const at::Tensor grad_products =
        (apply_gate(grad_scores, prefix.key_gate) * at::Scalar(attention_scale(args))).to(type);
    if (saved.needs(kQuery)) {
      result[kQuery] = times_keys(args, grad_products, prefix.key);
    }
    if (saved.needs(kPrefixKey)) {
      const at::Tensor per_row = contract_queries(args, grad_products, args.query);
      result[kPrefixKey] = select_backward(selection, args.prefix_key, reduce_rows(selection, per_row));
    }
    if (!need_gate) {
      return {};
    }
    const at::Tensor grad_gate = at::zeros_like(saved.gate.value);
    grad_gate.select(1, 0).add_((grad_scores * incoming.similarities).sum(at::IntArrayRef{1, 2, 3}));
    grad_gate.select(1, -1).add_((probabilities * on_values).sum(at::IntArrayRef{1, 2, 3}));
    return grad_gate;
  }

  static void through_sequence(const PrefixArguments& args, const Saved& saved, const Incoming& incoming,
                               variable_list& result) {
    if (!saved.needs_any({kQuery, kKey, kValue, kAttnMask})) {
      return;
    }
    if (incoming.flash) {
      auto [query, key, value] =
          flash_sequence_backward(args, incoming.mask, incoming.grad, saved.tensors[10], saved.tensors[11]);
      result[kQuery] = accumulate(result[kQuery], query);
      result[kKey] = key;
      result[kValue] = value;
      return;
    }
    const auto type = args.query.scalar_type();
    const at::Tensor& probabilities = incoming.probabilities.sequence;
    if (saved.needs(kValue)) {
      result[kValue] = contract_queries(args, probabilities.to(type), incoming.grad);
    }
    const at::Tensor on_values = times_keys(args, incoming.grad, args.value.transpose(-1, -2));
    const at::Tensor grad_scores = probabilities * (on_values - incoming.delta);
    if (saved.needs(kAttnMask)) {
      result[kAttnMask] = at::sum_to(grad_scores, args.attn_mask.sym_sizes()).to(args.attn_mask.scalar_type());
    }
    const at::Tensor grad_products = (grad_scores * at::Scalar(attention_scale(args))).to(type);
    if (saved.needs(kQuery)) {
      result[kQuery] = accumulate(result[kQuery], times_keys(args, grad_products, args.key));
    }
    if (saved.needs(kKey)) {
      result[kKey] = contract_queries(args, grad_products, args.query);
    }
  }
};

// Plain attention and dropout are made of calls that torch differentiates itself.
std::tuple<at::Tensor, at::Tensor> attend_differentiably(const PrefixArguments& args, const Selection& selection) {
  const at::Tensor mask = additive_mask(args);
  const Gate gate = composed_gate(args.x, args.rows, selection);
  const at::Tensor output = selection.kind == Selection::Kind::kBase
                                ? attend_without_prefix(args, mask)
                                : attend_with_dropout(args, select_prefix(args, selection, gate, /*trim=*/false), mask);
  return {output, gate_result(gate, args.x, args.rows, selection)};
}

std::tuple<at::Tensor, at::Tensor> gated_prefix_attention_autograd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({query, key, value, x, prefix_key, prefix_value, or_undefined(attn_mask),
                         or_undefined(gate_weight), or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_prefix_attention(query, key, value, x, prefix_key, prefix_value, prefix_length, attn_mask, dropout_p,
                                  is_causal, scale, enable_gqa, gate_weight, gate_bias, adapter_ids, adapter,
                                  token_mask);
  }
  const PrefixArguments args{query,
                             key,
                             value,
                             x,
                             prefix_key,
                             prefix_value,
                             prefix_length,
                             or_undefined(attn_mask),
                             dropout_p,
                             is_causal,
                             scale,
                             enable_gqa,
                             row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
  check(args);
  const Selection selection = resolve_selection("gated_prefix_attention", args.rows, prefix_key, /*recording=*/true);
  if (dropout_p > 0.0 || selection.kind == Selection::Kind::kBase) {
    return attend_differentiably(args, selection);
  }
  const variable_list result = GatedPrefixAttentionFunction::apply(
      query, key, value, x, prefix_key, prefix_value, attn_mask, gate_weight, gate_bias, prefix_length, adapter_ids,
      token_mask, adapter, is_causal, scale, enable_gqa);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_autograd));
}

}  // namespace
}  // namespace torchgraft::ops
