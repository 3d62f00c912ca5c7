#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_prefix_attention_meta(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  check(PrefixArguments{query, key, value, x, prefix_key, prefix_value, prefix_length, or_undefined(attn_mask),
                        dropout_p, is_causal, scale, enable_gqa,
                        row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)});
  const at::Tensor token_major =
      at::empty_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1), query.sym_size(3)}, query.options());
  const c10::SymInt gates = gate_weight.has_value() ? gate_weight->sym_size(1) : c10::SymInt(1);
  return {token_major.transpose(1, 2), at::empty_symint({x.sym_size(0), gates}, x.options())};
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) { m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_meta)); }

}  // namespace
}  // namespace torchgraft::ops
