#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/gate.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

Gate gate_forward(const at::Tensor& x, const RowArguments& args, const Selection& selection) {
  const bool gated = args.gate.weight.defined() && selection.kind != Selection::Kind::kBase;
  return gated && takes_fused_kernels(x) ? cpu::read_tokens(x, /*reader=*/{}, args, selection).gate
                                         : composed_gate(x, args, selection);
}

Gate composed_gate(const at::Tensor& x, const RowArguments& args, const Selection& selection) {
  Gate gate;
  if (!args.gate.weight.defined() || selection.kind == Selection::Kind::kBase) {
    return gate;
  }
  const auto type = accumulation_type(x.scalar_type());
  const at::Tensor weight = select(selection, args.gate.weight);            // [(B,) G, I]
  const at::Tensor bias = select(selection, args.gate.bias).unsqueeze(-2);  // [(B,) 1, G]
  gate.sigmoids = at::sigmoid(at::add(project(x, weight).to(type), bias));
  if (args.token_mask.defined()) {
    // s (1 - s) = 0 then: a token that is not averaged has no gradient either.
    gate.sigmoids = gate.sigmoids.masked_fill(args.token_mask.logical_not().unsqueeze(-1), 0);
    gate.tokens = args.token_mask.sum(1, /*keepdim=*/true).clamp_min(1).to(type);
  } else {
    gate.tokens = at::full_symint({1, 1}, x.sym_size(1).max(1), x.options().dtype(type));
  }
  // A division of two tensors: a product with the reciprocal would not give exactly 1 where all sigmoids are 1 (an
  // ungated slice of a gated bank).
  gate.value = zero_base_rows(selection, gate.sigmoids.sum(1) / gate.tokens);
  return gate;
}

at::Tensor gate_result(const Gate& gate, const at::Tensor& x, const RowArguments& args, const Selection& selection) {
  if (gate.value.defined()) {
    return gate.value.to(x.scalar_type());
  }
  const c10::SymInt gates = args.gate.weight.defined() ? args.gate.weight.sym_size(1) : c10::SymInt(1);
  const bool base = selection.kind == Selection::Kind::kBase;
  return zero_base_rows(selection, at::full_symint({x.sym_size(0), gates}, base ? 0 : 1, x.options()));
}

}  // namespace torchgraft::ops
