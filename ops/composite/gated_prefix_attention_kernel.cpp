#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>
#include <torchgraft/ops/attention.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/prefix_attention.h>

namespace torchgraft::ops {
namespace {

// By the kernel that a row without an adapter meets in a mixed batch, so that its bits do not depend on the batch.
at::Tensor without_prefix(const PrefixArguments& args, const at::Tensor& mask) {
  if (!cpu::takes(args)) {
    return attend_without_prefix(args, mask);
  }
  Prefix none;
  none.key = args.prefix_key.select(0, 0).narrow(1, 0, 0);
  none.value = args.prefix_value.select(0, 0).narrow(1, 0, 0);
  return cpu::attend(args, none, mask).output;
}

at::Tensor prefix_attention(const PrefixArguments& args, const Selection& selection, const Gate& gate) {
  // Detached: torch's choice of a kernel asks whether a mask requires grad even where nothing is recorded.
  at::Tensor mask = additive_mask(args);
  mask = mask.defined() && mask.requires_grad() ? mask.detach() : mask;
  if (selection.kind == Selection::Kind::kBase) {
    return without_prefix(args, mask);
  }
  const bool readable = args.prefix_length.is_cpu() && !at::isTensorSubclassLike(args.prefix_length);
  const Prefix prefix = select_prefix(args, selection, gate, /*trim=*/readable);
  if (TORCH_GUARD_OR_FALSE(prefix.key.sym_size(-2).sym_eq(0))) {
    return without_prefix(args, mask);
  }
  return args.dropout_p > 0.0 ? attend_with_dropout(args, prefix, mask) : attend(args, prefix, mask).output;
}

std::tuple<at::Tensor, at::Tensor> gated_prefix_attention_composite(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
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
  const Selection selection = resolve_selection("gated_prefix_attention", args.rows, prefix_key, /*recording=*/false);
  const Gate gate = gate_forward(x, args.rows, selection);
  return {prefix_attention(args, selection, gate), gate_result(gate, x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) { m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_composite)); }
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) {
  m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_composite));
}

}  // namespace
}  // namespace torchgraft::ops
