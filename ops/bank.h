#pragma once

#include <torchgraft/ops/arguments.h>

namespace torchgraft::ops {

// Which slice of a bank each batch row uses.
struct Selection {
  enum class Kind : int64_t {
    kBase,     // no row has an adapter
    kUniform,  // every row uses `adapter`: a bank is read as one slice, without a batch dimension
    kMixed,    // row b uses rows[b]: a bank is gathered to [B, ...]
  };
  Kind kind = Kind::kBase;
  int64_t adapter = -1;
  at::Tensor rows;        // kMixed: int64 [B], one of the others (or 0) where the row has no adapter
  at::Tensor active;      // kMixed: bool [B], false where the row has no adapter
  bool has_base = false;  // kMixed: false only when it is known that `active` is all true

  bool is_mixed() const { return kind == Kind::kMixed; }
};

// Reads the ids where that costs nothing (CPU): checks them against the bank's N with an error that names the row, and
// takes the uniform path when they agree. On CUDA the check is asynchronous. Fake and functional tensors, whose values
// cannot be read, take the mixed path.
// recording: for a graph; ids that are all -1 then stay mixed, so that parameters get zeros and not no gradient, as
// they do when the values of the ids are not known.
Selection resolve_selection(const char* op, const RowArguments& args, const at::Tensor& bank, bool recording);

// bank [N, ...] -> [...] (uniform) or [B, ...] (mixed; zeros for rows without an adapter). Not for kBase.
at::Tensor select(const Selection& selection, const at::Tensor& bank);

// The adjoint of `select`: grad as `select` returned its value -> [N, ...] as `bank`.
at::Tensor select_backward(const Selection& selection, const at::Tensor& bank, const at::Tensor& grad);

// `per_row` [B, ...] with zeros for the rows without an adapter.
at::Tensor zero_base_rows(const Selection& selection, const at::Tensor& per_row);

// x [B, S, K] times the transpose of a selected weight [(B,) M, K] -> [B, S, M].
at::Tensor project(const at::Tensor& x, const at::Tensor& weight);

// sum [B, S, M] (contiguous, overwritten) += x [B, S, K] times the transpose of weight [(B,) M, K].
void add_projection_(at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight);

// per_row [B, ...] -> [...] summed over the batch (uniform), or itself (mixed): the gradient of a selected value that
// was broadcast over the rows.
at::Tensor reduce_rows(const Selection& selection, const at::Tensor& per_row);

// The dtype in which sums over tokens or keys are taken: float32 for half precision, else the dtype itself.
at::ScalarType accumulation_type(at::ScalarType type);

}  // namespace torchgraft::ops
