#pragma once

#include <c10/core/SymFloat.h>
#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

#include <tuple>

namespace torchgraft::ops {

// The pieces of gated_prefix_attention. Scores and log-sum-exps are in accumulation_type(query's dtype). Everything
// but the flash kernels allows symbolic sizes.

c10::SymFloat attention_scale(const PrefixArguments& args);

// attn_mask as a summand of the scores, of four dimensions, in query's dtype; undefined without a mask.
at::Tensor additive_mask(const PrefixArguments& args);

// Grouped-query attention without repeating keys: [B, h, S, D] <-> [B, h_kv, (h / h_kv) S, D]. Identity when
// !enable_gqa.
at::Tensor group_heads(const PrefixArguments& args, const at::Tensor& per_head);
at::Tensor ungroup_heads(const PrefixArguments& args, const at::Tensor& grouped);

// left [B, h, S, K] times right [(B,) h_kv, K, D] -> [B, h, S, D]
at::Tensor times_keys(const PrefixArguments& args, const at::Tensor& left, const at::Tensor& right);

// left^T right of left [B, h, S, K] and right [B, h, S, D] -> [B, h_kv, K, D], summed over the heads that share keys.
at::Tensor contract_queries(const PrefixArguments& args, const at::Tensor& left, const at::Tensor& right);

// tensor times one gate per row ([B, 1, 1, 1]); the tensor itself when there is no gate.
at::Tensor apply_gate(const at::Tensor& tensor, const at::Tensor& gate);

// [B, h, S, d] with the memory of a contiguous [B, S, h, d].
at::Tensor as_token_major(const at::Tensor& output);

// scale query key^T + mask: [B, h, S, S_k]; -inf where a key is hidden.
at::Tensor sequence_scores(const PrefixArguments& args, const at::Tensor& mask);

// Attention over the sequence alone.
struct SequencePart {
  at::Tensor output;       // [B, h, S, d]; 0 where a query sees no key
  at::Tensor log_sum_exp;  // [B, h, S]; -inf where a query sees no key
};

// Whether torch's CPU flash kernel can compute the sequence part: dense CPU tensors, none empty, no dropout.
bool can_use_flash(const PrefixArguments& args);
SequencePart flash_sequence(const PrefixArguments& args, const at::Tensor& mask);

// Gradients of query, key and value in the sequence part, given the *merged* output and log-sum-exp (finite).
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_sequence_backward(const PrefixArguments& args,
                                                                       const at::Tensor& mask, const at::Tensor& grad,
                                                                       const at::Tensor& output,
                                                                       const at::Tensor& log_sum_exp);

// The prefixes that the rows use.
struct Prefix {
  at::Tensor key;         // [(B,) h_kv, P, d], not gated; the bank with `rows`
  at::Tensor value;       // [(B,) h_kv, P, d], not gated; the bank with `rows`
  at::Tensor rows;        // int64 [B]: the slice of key and value for each row; undefined: its own, or the only one
  at::Tensor hidden;      // bool [P] or [B, 1, 1, P]: positions past the row's prefix_length. Undefined: none
  at::Tensor key_gate;    // [B, 1, 1, 1]; undefined: not gated
  at::Tensor value_gate;  // [B, 1, 1, 1]
};

// The prefix with zeros for the keys and values that are hidden. Their probability is 0, but 0 times NaN is NaN:
// whoever multiplies by them calls this first. The fused kernels do not read them.
Prefix with_zeros_where_hidden(Prefix prefix);

// trim: leave out, rather than hide, the positions that a uniform selection does not use, and copy no slice of a bank
// that cpu::attend() can read in place. That reads prefix_length: for dense CPU tensors only. Not for a base selection.
Prefix select_prefix(const PrefixArguments& args, const Selection& selection, const Gate& gate, bool trim);

// scale query key^T of the prefix without its gate: [B, h, S, P].
at::Tensor prefix_similarities(const PrefixArguments& args, const Prefix& prefix);

// Their scores: gated, -inf where hidden.
at::Tensor prefix_scores(const Prefix& prefix, const at::Tensor& similarities);

// Softmax over prefix and sequence together; 0 where a query sees nothing.
struct Probabilities {
  at::Tensor sequence;  // [B, h, S, S_k]
  at::Tensor prefix;    // [B, h, S, P], without the value gate
};
Probabilities joint_softmax(const at::Tensor& sequence_scores, const at::Tensor& prefix_scores);

// Whether exp(score - log_sum_exp) is precise. It is not where a mask of finite but huge values hides every key of a
// query: finfo.min + log(keys) rounds to finfo.min, and each of the keys gets the probability 1. Reads values.
bool is_precise(const at::Tensor& log_sum_exp);

struct AttentionForward {
  at::Tensor output;  // [B, h, S, d], as_token_major
  // [B, h, S] over prefix and sequence; 0 where a query sees nothing, for exp(-inf - 0) = 0. Undefined where the flash
  // kernel was not used: its gradient alone needs the values.
  at::Tensor log_sum_exp;
};

// Attends to prefix and sequence, and merges. mask: additive_mask(args).
AttentionForward attend(const PrefixArguments& args, const Prefix& selected, const at::Tensor& mask);

// The same with dropout on all probabilities, by ATen's operators, which record a graph when grad mode is on.
at::Tensor attend_with_dropout(const PrefixArguments& args, const Prefix& selected, const at::Tensor& mask);

// Without any prefix: scaled_dot_product_attention, as_token_major. Differentiable, too.
at::Tensor attend_without_prefix(const PrefixArguments& args, const at::Tensor& mask);

}  // namespace torchgraft::ops
