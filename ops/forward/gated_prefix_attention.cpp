#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>
#include <torchgraft/ops/attention.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/prefix_attention.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_prefix_attention.h>

namespace torchgraft::ops {
namespace {

// By the kernel that computes base rows in a mixed batch, so that a row's bits do not depend on the batch.
at::Tensor without_prefix(const PrefixArguments& args, const at::Tensor& mask) {
  if (!cpu::takes_fused_attention(args)) {
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

std::tuple<at::Tensor, at::Tensor> prefix_attention_forward(const PrefixArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.prefix_key, /*recording=*/false);
  const Gate gate = gate_forward(args.x, args.rows, selection);
  return {prefix_attention(args, selection, gate), gate_result(gate, args.x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("gated_prefix_attention",
         from_schema<PrefixArguments, prefix_attention_forward, decltype(gated_prefix_attention)>);
}

}  // namespace
}  // namespace torchgraft::ops
