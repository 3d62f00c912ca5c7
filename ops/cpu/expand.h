#pragma once

#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/cpu/token_tiles.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops::cpu {

// The wide side of an update: base + c (hidden weight^T + bias), where c of a row is its scaling times its gate. Banks,
// of base's dtype.
struct Expansion {
  at::Tensor weight{};   // [N, O, R]
  at::Tensor bias{};     // [N, O]; may be undefined
  at::Tensor scaling{};  // [N], [N, 1], or [N, O]: per channel
};

// base [B, S, O] float32 or bfloat16, hidden [B, S, R] float32 -> [B, S, O], contiguous. Base rows come out as they are
// in `base`.
at::Tensor expand(const at::Tensor& base, const at::Tensor& hidden, const Expansion& expansion, const Gate& gate,
                  const Selection& selection);

// c of every row, [B]: `scaling` [N] or [N, 1] (undefined: 1) times the gate's first column. 0 for base rows.
std::vector<float> row_coefficients(const at::Tensor& scaling, const Gate& gate, const TokenRuns& runs, int64_t batch);

// to [rows, columns] = x [rows, columns] times the coefficient of each token's row; tokens count from `first` in [B S].
void scale_rows(const float* x, int64_t rows, int64_t columns, const std::vector<float>& coefficients, int64_t first,
                int64_t tokens, float* to, int64_t to_stride);

}  // namespace torchgraft::ops::cpu
