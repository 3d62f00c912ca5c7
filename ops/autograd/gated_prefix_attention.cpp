#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>
#include <torchgraft/ops/attention.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/autograd/token_reads.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/prefix_attention_gradient.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_choice.h>

#include <array>

namespace torchgraft::ops {
namespace {

// For prefix adapters without dropout. Base selections do not come here.
struct PrefixGradient {
  using Arguments = PrefixArguments;

  template <typename Value>
  struct Inputs {
    Value query{};
    Value key{};
    Value value{};
    Value x{};
    Value prefix_key{};
    Value prefix_value{};
    Value attn_mask{};
    GateInputs<Value> gate{};
    std::array<Value*, 9> all() {
      return {&query, &key, &value, &x, &prefix_key, &prefix_value, &attn_mask, &gate.weight, &gate.bias};
    }
  };
  using Gradients = Inputs<at::Tensor>;
  using Needs = Inputs<bool>;

  struct Saved {
    PrefixArguments args;  // but for args.rows, whose gate's parameters are apart
    GateParameters gate_parameters;
    AttentionForward attention;
    Selection selection;
    Gate gate;

    std::vector<at::Tensor*> tensors() {
      return {&args.query,        &args.key,           &args.value,     &args.x,           &args.prefix_key,
              &args.prefix_value, &args.prefix_length, &args.attn_mask, &attention.output, &attention.log_sum_exp};
    }
  };

  static Inputs<at::Tensor> inputs(const Arguments& args) {
    return {.query = args.query,
            .key = args.key,
            .value = args.value,
            .x = args.x,
            .prefix_key = args.prefix_key,
            .prefix_value = args.prefix_value,
            .attn_mask = args.attn_mask,
            .gate = {args.rows.gate.weight, args.rows.gate.bias}};
  }

  static Recorded<Saved> forward(const Arguments& args) {
    const Selection selection = resolve_selection(args.kOperator, args.rows, args.prefix_key, /*recording=*/true);
    TORCH_INTERNAL_ASSERT(selection.kind != Selection::Kind::kBase, "plain attention takes another path");
    const Gate gate = gate_forward(args.x, args.rows, selection);
    const Prefix prefix = select_prefix(args, selection, gate, /*trim=*/false);
    const AttentionForward attention = attend(args, prefix, additive_mask(args));
    Recorded<Saved> result{.output = attention.output,
                           .gate = gate_result(gate, args.x, args.rows, selection),
                           .saved = {.args = args,
                                     .gate_parameters = args.rows.gate,
                                     .attention = attention,
                                     .selection = selection,
                                     .gate = gate}};
    result.saved.args.rows = {};
    return result;
  }

  static Gradients backward(const Saved& saved, const ResultGradients& grads, const Needs& needs) {
    Gradients gradients;
    const bool need_gate = saved.gate.value.defined() && (needs.x || needs.gate.any());
    at::Tensor grad_gate;  // [B, G]
    if (grads.output.defined() && takes_fused(saved, grads.output, needs)) {
      grad_gate = through_fused(saved, grads.output, needs, need_gate, gradients);
    } else if (grads.output.defined()) {
      const Incoming incoming = prepare(saved, grads.output, needs);
      grad_gate = through_prefix(saved, incoming, needs, need_gate, gradients);
      through_sequence(saved, incoming, needs, gradients);
    }
    if (need_gate) {
      TokenReads reads(saved.selection, saved.args.x);
      reads.add_gate(saved.gate, accumulate(grad_gate, grads.gate), saved.gate_parameters, needs.gate, gradients.gate);
      gradients.x = reads.backward(needs.x);
    }
    return gradients;
  }

 private:
  // Whether probabilities can be computed again from the scores and the saved log-sum-exp, block by block.
  static bool can_use_log_sum_exp(const Saved& saved, const at::Tensor& grad, const Needs& needs) {
    const at::Tensor& log_sum_exp = saved.attention.log_sum_exp;
    return log_sum_exp.defined() && !needs.attn_mask && can_use_flash(saved.args) && !at::isTensorSubclassLike(grad) &&
           is_precise(log_sum_exp);
  }

  static bool takes_fused(const Saved& saved, const at::Tensor& grad, const Needs& needs) {
    return takes_fused_gradients(saved.args.query, grad) && can_use_log_sum_exp(saved, grad, needs);
  }

  // Prefix and sequence by one kernel. Returns the gate's gradient if it is needed.
  static at::Tensor through_fused(const Saved& saved, const at::Tensor& grad, const Needs& needs, bool need_gate,
                                  Gradients& gradients) {
    const PrefixArguments& args = saved.args;
    const Selection& selection = saved.selection;
    const Prefix prefix = select_prefix(args, selection, saved.gate, /*trim=*/false);
    const cpu::AttentionGradients found =
        cpu::attend_backward(args, prefix, additive_mask(args), saved.attention, grad, needs.key, needs.value);
    gradients.query = found.query;
    gradients.key = found.key;
    gradients.value = found.value;
    const auto of_bank = [&](const at::Tensor& gated, const at::Tensor& gate, const at::Tensor& bank) {
      return select_backward(selection, bank, reduce_rows(selection, apply_gate(gated, gate)));
    };
    if (needs.prefix_key) {
      gradients.prefix_key = of_bank(found.prefix_key, prefix.key_gate, args.prefix_key);
    }
    if (needs.prefix_value) {
      gradients.prefix_value = of_bank(found.prefix_value, prefix.value_gate, args.prefix_value);
    }
    if (!need_gate) {
      return {};
    }
    const Prefix read = with_zeros_where_hidden(prefix);
    return gate_gradient(saved.gate, found.prefix_key * read.key, found.prefix_value * read.value);
  }

  // [B, G], from the products [B, h, S, P] or [B, h, P, d] whose sums are the gradients of key gate and value gate.
  static at::Tensor gate_gradient(const Gate& gate, const at::Tensor& on_keys, const at::Tensor& on_values) {
    const at::Tensor gradient = at::zeros_like(gate.value);
    gradient.select(1, 0).add_(on_keys.sum(at::IntArrayRef{1, 2, 3}));
    gradient.select(1, -1).add_(on_values.sum(at::IntArrayRef{1, 2, 3}));
    return gradient;
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

  static Incoming prepare(const Saved& saved, const at::Tensor& grad, const Needs& needs) {
    const PrefixArguments& args = saved.args;
    const auto& [output, log_sum_exp] = saved.attention;
    Incoming incoming;
    incoming.grad = grad;
    incoming.delta =
        (grad * output).sum(at::IntArrayRef{-1}, /*keepdim=*/true, accumulation_type(args.query.scalar_type()));
    incoming.mask = additive_mask(args);
    incoming.prefix = with_zeros_where_hidden(select_prefix(args, saved.selection, saved.gate, /*trim=*/false));
    incoming.similarities = prefix_similarities(args, incoming.prefix);
    incoming.flash = can_use_log_sum_exp(saved, grad, needs);
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
  static at::Tensor through_prefix(const Saved& saved, const Incoming& incoming, const Needs& needs, bool need_gate,
                                   Gradients& gradients) {
    const PrefixArguments& args = saved.args;
    const bool need_scores = needs.query || needs.prefix_key || need_gate;
    if (!need_scores && !needs.prefix_value) {
      return {};
    }
    const Selection& selection = saved.selection;
    const auto type = args.query.scalar_type();
    const Prefix& prefix = incoming.prefix;
    const at::Tensor& probabilities = incoming.probabilities.prefix;
    if (needs.prefix_value) {
      const at::Tensor per_row =
          contract_queries(args, apply_gate(probabilities, prefix.value_gate).to(type), incoming.grad);
      gradients.prefix_value = select_backward(selection, args.prefix_value, reduce_rows(selection, per_row));
    }
    if (!need_scores) {
      return {};
    }
    const at::Tensor on_values =
        times_keys(args, incoming.grad, prefix.value.transpose(-1, -2)).to(probabilities.scalar_type());
    const at::Tensor grad_scores = probabilities * (apply_gate(on_values, prefix.value_gate) - incoming.delta);
    const at::Tensor grad_products =
        (apply_gate(grad_scores, prefix.key_gate) * at::Scalar(attention_scale(args))).to(type);
    if (needs.query) {
      gradients.query = times_keys(args, grad_products, prefix.key);
    }
    if (needs.prefix_key) {
      const at::Tensor per_row = contract_queries(args, grad_products, args.query);
      gradients.prefix_key = select_backward(selection, args.prefix_key, reduce_rows(selection, per_row));
    }
    if (!need_gate) {
      return {};
    }
    return gate_gradient(saved.gate, grad_scores * incoming.similarities, probabilities * on_values);
  }

  static void through_sequence(const Saved& saved, const Incoming& incoming, const Needs& needs, Gradients& gradients) {
    const PrefixArguments& args = saved.args;
    if (!(needs.query || needs.key || needs.value || needs.attn_mask)) {
      return;
    }
    if (incoming.flash) {
      auto [query, key, value] = flash_sequence_backward(args, incoming.mask, incoming.grad, saved.attention.output,
                                                         saved.attention.log_sum_exp);
      gradients.query = accumulate(gradients.query, query);
      gradients.key = key;
      gradients.value = value;
      return;
    }
    const auto type = args.query.scalar_type();
    const at::Tensor& probabilities = incoming.probabilities.sequence;
    if (needs.value) {
      gradients.value = contract_queries(args, probabilities.to(type), incoming.grad);
    }
    const at::Tensor on_values = times_keys(args, incoming.grad, args.value.transpose(-1, -2));
    const at::Tensor grad_scores = probabilities * (on_values - incoming.delta);
    if (needs.attn_mask) {
      gradients.attn_mask = at::sum_to(grad_scores, args.attn_mask.sym_sizes()).to(args.attn_mask.scalar_type());
    }
    const at::Tensor grad_products = (grad_scores * at::Scalar(attention_scale(args))).to(type);
    if (needs.query) {
      gradients.query = accumulate(gradients.query, times_keys(args, grad_products, args.key));
    }
    if (needs.key) {
      gradients.key = contract_queries(args, grad_products, args.query);
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

std::tuple<at::Tensor, at::Tensor> record_prefix_attention(const PrefixArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.prefix_key, /*recording=*/true);
  if (args.dropout_p > 0.0 || selection.kind == Selection::Kind::kBase) {
    return attend_differentiably(args, selection);
  }
  return GradientNode<PrefixGradient>::record(args);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_prefix_attention", autograd_kernel<PrefixArguments, gated_prefix_attention, record_prefix_attention>);
}

}  // namespace
}  // namespace torchgraft::ops
