#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>

namespace torchgraft::ops {

// g[b] = mean over tokens of sigmoid(x weight^T + bias), as in UniPELT (Mao et al. 2022, section 3.2) and
// the adapters library. Sums are taken in accumulation_type(x's dtype).
struct Gate {
  at::Tensor value;     // [B, G]; 0 for base rows and for rows without a real token. Undefined: not gated
  at::Tensor sigmoids;  // [B, S, G]; 0 at tokens that are masked out
  at::Tensor tokens;    // [B, 1] or [1, 1]: how many tokens were averaged, at least 1
};

// Without gate parameters, and for a base selection, every member is undefined.
Gate gate_forward(const at::Tensor& x, const RowArguments& args, const Selection& selection);

// The same by ATen's operators, which torch differentiates itself.
Gate composed_gate(const at::Tensor& x, const RowArguments& args, const Selection& selection);

// What an operator returns as its second result: [B, G] in x's dtype; ones without a gate, zeros for base rows.
at::Tensor gate_result(const Gate& gate, const at::Tensor& x, const RowArguments& args, const Selection& selection);

}  // namespace torchgraft::ops
