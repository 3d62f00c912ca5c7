#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/attention.h>
#include <torchgraft/ops/cpu/prefix_attention.h>

#include <algorithm>
#include <limits>

namespace torchgraft::ops {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();

// The flash kernels read heads with stride 1 along d. For other layouts they give wrong numbers, not an error.
at::Tensor with_dense_heads(const at::Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

at::Tensor row_factor(const at::Tensor& gate, int64_t column) {
  return gate.select(1, column).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
}

// probabilities [B, h, S, K] times values [(B,) h_kv, K, d] -> [B, h, S, d], in the query's dtype
at::Tensor weigh(const PrefixArguments& args, const at::Tensor& probabilities, const at::Tensor& values) {
  return times_keys(args, probabilities.to(args.query.scalar_type()), values);
}

// 0 for -inf: where a query sees nothing, exp(score - 0) is 0, but exp(score + inf) would be NaN.
at::Tensor finite_log_sum_exp(const at::Tensor& log_sum_exp) {
  return log_sum_exp.masked_fill(at::isneginf(log_sum_exp), 0);
}

}  // namespace

c10::SymFloat attention_scale(const PrefixArguments& args) {
  return args.scale.has_value() ? c10::SymFloat(*args.scale)
                                : c10::SymFloat(1.0) / c10::SymFloat(args.query.sym_size(-1)).sqrt();
}

at::Tensor additive_mask(const PrefixArguments& args) {
  at::Tensor mask = args.attn_mask;
  if (!mask.defined()) {
    return mask;
  }
  if (mask.scalar_type() == at::kBool) {
    mask = at::zeros_like(mask, args.query.options()).masked_fill(mask.logical_not(), kNegativeInfinity);
  } else {
    mask = mask.to(args.query.scalar_type());
  }
  while (mask.dim() < 4) {
    mask = mask.unsqueeze(0);
  }
  return mask;
}

at::Tensor group_heads(const PrefixArguments& args, const at::Tensor& per_head) {
  if (!args.enable_gqa) {
    return per_head;
  }
  const c10::SymInt kv_heads = args.key.sym_size(1);
  const c10::SymInt rows = (per_head.sym_size(1) / kv_heads) * per_head.sym_size(2);
  return per_head.reshape_symint({per_head.sym_size(0), kv_heads, rows, per_head.sym_size(3)});
}

at::Tensor ungroup_heads(const PrefixArguments& args, const at::Tensor& grouped) {
  if (!args.enable_gqa) {
    return grouped;
  }
  return grouped.reshape_symint(
      {args.query.sym_size(0), args.query.sym_size(1), args.query.sym_size(2), grouped.sym_size(3)});
}

at::Tensor times_keys(const PrefixArguments& args, const at::Tensor& left, const at::Tensor& right) {
  return ungroup_heads(args, at::matmul(group_heads(args, left), right));
}

at::Tensor contract_queries(const PrefixArguments& args, const at::Tensor& left, const at::Tensor& right) {
  return at::matmul(group_heads(args, left).transpose(-1, -2), group_heads(args, right));
}

at::Tensor apply_gate(const at::Tensor& tensor, const at::Tensor& gate) {
  return gate.defined() ? tensor * gate : tensor;
}

at::Tensor as_token_major(const at::Tensor& output) { return output.transpose(1, 2).contiguous().transpose(1, 2); }

at::Tensor sequence_scores(const PrefixArguments& args, const at::Tensor& mask) {
  const at::Tensor products = times_keys(args, args.query, args.key.transpose(-1, -2));
  at::Tensor scores = products.to(accumulation_type(args.query.scalar_type()));
  scores = scores * at::Scalar(attention_scale(args));
  if (mask.defined()) {
    scores = scores + mask;
  }
  if (args.is_causal) {
    const at::Tensor allowed =
        at::ones_symint({args.query.sym_size(2), args.key.sym_size(2)}, args.query.options().dtype(at::kBool)).tril();
    scores = scores.masked_fill(allowed.logical_not(), kNegativeInfinity);
  }
  return scores;
}

bool can_use_flash(const PrefixArguments& args) {
  for (const at::Tensor* tensor : {&args.query, &args.key, &args.value}) {
    if (at::isTensorSubclassLike(*tensor) || !tensor->is_cpu() || tensor->numel() == 0) {
      return false;
    }
  }
  return args.dropout_p == 0.0;
}

SequencePart flash_sequence(const PrefixArguments& args, const at::Tensor& mask) {
  const std::optional<at::Tensor> optional_mask = mask.defined() ? std::make_optional(mask) : std::nullopt;
  auto [output, log_sum_exp] = at::_scaled_dot_product_flash_attention_for_cpu(
      with_dense_heads(args.query), with_dense_heads(args.key), with_dense_heads(args.value), /*dropout_p=*/0.0,
      args.is_causal, optional_mask, args.scale);
  if (mask.defined()) {
    // The kernel reports 0 for a query whose keys are all masked with -inf: the merge must see -inf.
    const at::Tensor blind = at::isneginf(mask).all(-1);  // [B|1, h|1, S|1]
    log_sum_exp = log_sum_exp.masked_fill(blind, kNegativeInfinity);
  }
  return {output, log_sum_exp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_sequence_backward(const PrefixArguments& args,
                                                                       const at::Tensor& mask, const at::Tensor& grad,
                                                                       const at::Tensor& output,
                                                                       const at::Tensor& log_sum_exp) {
  const int64_t kv_heads = args.key.size(1);
  const int64_t group = args.query.size(1) / kv_heads;
  const auto repeated = [group](const at::Tensor& tensor) {
    return group == 1 ? with_dense_heads(tensor) : tensor.repeat_interleave(group, 1);
  };
  const auto summed = [group, kv_heads](const at::Tensor& tensor) {
    return group == 1 ? tensor : tensor.unflatten(1, {kv_heads, group}).sum(2);
  };
  auto [grad_query, grad_key, grad_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      with_dense_heads(grad), with_dense_heads(args.query), repeated(args.key), repeated(args.value), output,
      log_sum_exp, /*dropout_p=*/0.0, args.is_causal, mask.defined() ? std::make_optional(mask) : std::nullopt,
      args.scale);
  return {grad_query, summed(grad_key), summed(grad_value)};
}

Prefix with_zeros_where_hidden(Prefix prefix) {
  if (prefix.hidden.defined()) {
    const at::Tensor positions = prefix.hidden.transpose(-1, -2);
    prefix.key = prefix.key.masked_fill(positions, 0);
    prefix.value = prefix.value.masked_fill(positions, 0);
  }
  return prefix;
}

Prefix select_prefix(const PrefixArguments& args, const Selection& selection, const Gate& gate, bool trim) {
  Prefix prefix;
  if (trim && selection.is_mixed() && cpu::reads_bank_in_place(args, selection)) {
    prefix.key = args.prefix_key;
    prefix.value = args.prefix_value;
    prefix.rows = selection.rows;
  } else {
    prefix.key = select(selection, args.prefix_key);
    prefix.value = select(selection, args.prefix_value);
  }
  if (trim && !selection.is_mixed()) {
    // By few calls of ATen: with a few tokens, calls are most of what the operator costs.
    const int64_t length = args.prefix_length.const_data_ptr<int64_t>()[selection.slice * args.prefix_length.stride(0)];
    const int64_t used = std::clamp<int64_t>(length, 0, prefix.key.size(-2));
    if (used < prefix.key.size(-2)) {
      prefix.key = prefix.key.narrow(-2, 0, used);
      prefix.value = prefix.value.narrow(-2, 0, used);
    }
  } else {
    const at::Tensor length = select(selection, args.prefix_length);  // [] or [B]; 0 for base rows
    const at::Tensor positions = at::arange(args.prefix_key.sym_size(2), args.prefix_length.options());
    prefix.hidden = at::ge(positions, length.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1));
  }
  if (gate.value.defined()) {
    prefix.key_gate = row_factor(gate.value, 0);
    prefix.value_gate = row_factor(gate.value, -1);
  }
  return prefix;
}

at::Tensor prefix_similarities(const PrefixArguments& args, const Prefix& prefix) {
  const at::Tensor products = times_keys(args, args.query, prefix.key.transpose(-1, -2));
  return products.to(accumulation_type(args.query.scalar_type())) * at::Scalar(attention_scale(args));
}

at::Tensor prefix_scores(const Prefix& prefix, const at::Tensor& similarities) {
  const at::Tensor scores = apply_gate(similarities, prefix.key_gate);
  return prefix.hidden.defined() ? scores.masked_fill(prefix.hidden, kNegativeInfinity) : scores;
}

Probabilities joint_softmax(const at::Tensor& sequence_scores, const at::Tensor& prefix_scores) {
  const at::Tensor log_sum_exp =
      finite_log_sum_exp(at::logaddexp(at::logsumexp(sequence_scores, -1), at::logsumexp(prefix_scores, -1)));
  Probabilities result{at::exp(sequence_scores - log_sum_exp.unsqueeze(-1)),
                       at::exp(prefix_scores - log_sum_exp.unsqueeze(-1))};
  // Almost 1; the number of keys where is_precise(log_sum_exp) is false; 0 where a query sees nothing.
  const at::Tensor sum = at::add(result.sequence.sum(-1, /*keepdim=*/true), result.prefix.sum(-1, /*keepdim=*/true));
  const at::Tensor divisor = sum.masked_fill(at::eq(sum, 0), 1);
  result.sequence = result.sequence.div_(divisor);
  result.prefix = result.prefix.div_(divisor);
  return result;
}

bool is_precise(const at::Tensor& log_sum_exp) {
  constexpr double kTolerance = 1e-4;
  const double epsilon = log_sum_exp.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                                  : std::numeric_limits<float>::epsilon();
  return log_sum_exp.abs().max().item<double>() * epsilon < kTolerance;
}

AttentionForward attend(const PrefixArguments& args, const Prefix& selected, const at::Tensor& mask) {
  if (cpu::takes_fused_attention(args)) {
    AttentionForward result = cpu::attend(args, selected, mask);
    if (!can_use_flash(args)) {
      result.log_sum_exp.reset();  // the flash kernel's gradient cannot take such arguments either
    }
    return result;
  }
  const Prefix prefix = with_zeros_where_hidden(selected);
  // Scale and gates go to the few prefix keys and values instead of to every score.
  const auto type = args.query.scalar_type();
  const at::Tensor keys = apply_gate(prefix.key * at::Scalar(attention_scale(args)), prefix.key_gate).to(type);
  const at::Tensor values = apply_gate(prefix.value, prefix.value_gate).to(type);
  at::Tensor scores = times_keys(args, args.query, keys.transpose(-1, -2)).to(accumulation_type(type));
  if (prefix.hidden.defined()) {
    scores = scores.masked_fill(prefix.hidden, kNegativeInfinity);
  }
  AttentionForward result;
  if (can_use_flash(args)) {
    const SequencePart sequence = flash_sequence(args, mask);
    result.log_sum_exp = finite_log_sum_exp(at::logaddexp(sequence.log_sum_exp, at::logsumexp(scores, -1)));
    // In place: the kernel's output is ours, and already token-major where the query is.
    result.output = sequence.output;
    result.output.mul_(at::exp(sequence.log_sum_exp - result.log_sum_exp).unsqueeze(-1));
    result.output.add_(weigh(args, at::exp(scores - result.log_sum_exp.unsqueeze(-1)), values));
  } else {
    const Probabilities probabilities = joint_softmax(sequence_scores(args, mask), scores);
    result.output = weigh(args, probabilities.sequence, args.value) + weigh(args, probabilities.prefix, values);
  }
  result.output = as_token_major(result.output);
  return result;
}

at::Tensor attend_with_dropout(const PrefixArguments& args, const Prefix& selected, const at::Tensor& mask) {
  const Prefix prefix = with_zeros_where_hidden(selected);
  const at::Tensor scores =
      at::cat({prefix_scores(prefix, prefix_similarities(args, prefix)), sequence_scores(args, mask)}, -1);
  // _safe_softmax: 0, and a gradient of 0, for a query that sees nothing.
  const at::Tensor kept = at::dropout(at::_safe_softmax(scores, -1), args.dropout_p, /*train=*/true);
  const c10::SymInt positions = prefix.key.sym_size(-2);
  const at::Tensor on_prefix = apply_gate(kept.slice_symint(-1, 0, positions), prefix.value_gate);
  const at::Tensor on_sequence = kept.slice_symint(-1, positions);
  return as_token_major(weigh(args, on_prefix, prefix.value) + weigh(args, on_sequence, args.value));
}

at::Tensor attend_without_prefix(const PrefixArguments& args, const at::Tensor& mask) {
  return as_token_major(at::scaled_dot_product_attention(args.query, args.key, args.value,
                                                         mask.defined() ? std::make_optional(mask) : std::nullopt,
                                                         args.dropout_p, args.is_causal, args.scale, args.enable_gqa));
}

}  // namespace torchgraft::ops
