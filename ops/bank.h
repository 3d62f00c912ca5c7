#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// Which slice of a bank, that is, which of its N adapters, each batch row uses. A base row uses none (id -1): it comes
// out as the base model computes it.
struct Selection {
  enum class Kind : int64_t {
    kBase,     // every row is a base row
    kUniform,  // every row uses `slice`: a bank is read as one slice, without a batch dimension
    kMixed,    // row b uses rows[b]: a bank is gathered to [B, ...]
  };
  Kind kind = Kind::kBase;
  int64_t slice = -1;
  at::Tensor rows;        // kMixed: int64 [B], one of the others (or 0) for a base row
  at::Tensor active;      // kMixed: bool [B], false for a base row
  bool has_base = false;  // kMixed: false only when it is known that `active` is all true

  bool is_mixed() const { return kind == Kind::kMixed; }
};

// On the CPU, where reading ids costs nothing, checks them against the bank's N (the error names the row) and makes the
// selection uniform when they agree. On CUDA the check is asynchronous. The values of fake and functional tensors
// cannot be read: their selection is mixed.
// recording: a graph is recorded. Ids that are all -1 then stay mixed: parameters get gradients of zeros, not none, as
// they do where the ids cannot be read.
Selection resolve_selection(const char* op, const RowArguments& args, const at::Tensor& bank, bool recording);

// bank [N, ...] -> [...] (uniform) or [B, ...] (mixed; zeros for base rows). Not for kBase.
at::Tensor select(const Selection& selection, const at::Tensor& bank);

// The adjoint of `select`: grad as `select` returned its value -> [N, ...] as `bank`.
at::Tensor select_backward(const Selection& selection, const at::Tensor& bank, const at::Tensor& grad);

// `per_row` [B, ...] with zeros for the base rows.
at::Tensor zero_base_rows(const Selection& selection, const at::Tensor& per_row);

// x [..., K] weight^T + bias of weight [M, K]; bias [M] may be undefined.
at::Tensor linear_map(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

// x [B, S, K] times the transpose of a selected weight [(B,) M, K] -> [B, S, M].
at::Tensor project(const at::Tensor& x, const at::Tensor& weight);

// sum [B, S, M] (contiguous, overwritten) += x [B, S, K] times the transpose of weight [(B,) M, K].
void add_projection_(at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight);

// per_row [B, ...] -> [...] summed over the batch (uniform), or itself (mixed): the gradient of a selected value that
// was broadcast over the rows.
at::Tensor reduce_rows(const Selection& selection, const at::Tensor& per_row);

// The dtype in which sums over tokens or keys are taken: float32 for float16 and bfloat16, else the dtype itself.
at::ScalarType accumulation_type(at::ScalarType type);

}  // namespace torchgraft::ops
