#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/linear.h>
#include <torchgraft/ops/reft.h>
#include <torchgraft/ops/residual_norm.h>

// What comes out of each operator, by sizes alone. The compositions of ops/forward/ would do for meta tensors, too, and
// pass torch.library.opcheck; but inside a kernel ATen's meta functions refuse sizes without a hint (torch.export's
// unbacked ones, as of rows that were selected by value). Here such sizes pass, and add no guards.

namespace torchgraft::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;

// [B, gates]
at::Tensor gate_of(const at::Tensor& x, const c10::SymInt& gates) {
  return at::empty_symint({x.sym_size(0), gates}, x.options());
}

Results lora(const LoraArguments& args) {
  check(args);
  return {at::empty_symint(args.base.sym_sizes(), args.base.options()), gate_of(args.x, 1)};
}

Results lora_linear(const LoraLinearArguments& args) {
  check(args);
  const at::Tensor& x = args.x;
  return {at::empty_symint({x.sym_size(0), x.sym_size(1), args.weight.sym_size(0)}, x.options()), gate_of(x, 1)};
}

// With or without the linear map.
template <typename Arguments>
Results bottleneck(const Arguments& args) {
  check(args);
  return {at::empty_symint(args.x.sym_sizes(), args.x.options()), gate_of(args.x, 1)};
}

Results prefix_attention(const PrefixArguments& args) {
  check(args);
  const at::Tensor& query = args.query;
  const at::Tensor token_major =
      at::empty_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1), query.sym_size(3)}, query.options());
  const at::Tensor& weight = args.rows.gate.weight;
  const c10::SymInt gates = weight.defined() ? weight.sym_size(1) : c10::SymInt(1);
  return {token_major.transpose(1, 2), gate_of(args.x, gates)};
}

at::Tensor linear_result(const LinearArguments& args) {
  check(args);
  c10::SymDimVector sizes(args.x.sym_sizes());
  sizes.back() = args.weight.sym_size(0);
  return at::empty_symint(sizes, args.x.options());
}

Results normed(const ResidualNormArguments& args) {
  check(args);
  const at::Tensor sum = at::add(args.x, args.residual);
  check_sum(args, sum);
  return {at::empty_symint(sum.sym_sizes(), sum.options()), sum};
}

at::Tensor changed_tokens(const ReftArguments& args) {
  check(args);
  return at::empty_symint(args.x.sym_sizes(), args.x.options());
}

at::Tensor real_tokens(const TokenMaskArguments& args) {
  check(args);
  return at::empty_symint({args.x.sym_size(0), args.x.sym_size(1)}, args.x.options().dtype(at::kBool));
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) {
  m.impl("gated_lora", from_schema<LoraArguments, lora, decltype(gated_lora)>);
  m.impl("gated_lora_linear", from_schema<LoraLinearArguments, lora_linear, decltype(gated_lora_linear)>);
  m.impl("gated_bottleneck",
         from_schema<BottleneckArguments, bottleneck<BottleneckArguments>, decltype(gated_bottleneck)>);
  m.impl(
      "gated_bottleneck_linear",
      from_schema<BottleneckLinearArguments, bottleneck<BottleneckLinearArguments>, decltype(gated_bottleneck_linear)>);
  m.impl("gated_prefix_attention", from_schema<PrefixArguments, prefix_attention, decltype(gated_prefix_attention)>);
  m.impl("reft", from_schema<ReftArguments, changed_tokens, decltype(reft)>);
  m.impl("linear", from_schema<LinearArguments, linear_result, decltype(linear)>);
  m.impl("residual_norm", from_schema<ResidualNormArguments, normed, decltype(residual_norm)>);
  m.impl("attention_token_mask", from_schema<TokenMaskArguments, real_tokens, decltype(attention_token_mask)>);
}

}  // namespace
}  // namespace torchgraft::ops
