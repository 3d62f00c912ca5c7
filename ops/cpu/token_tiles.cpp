#include <ATen/ATen.h>
#include <torchgraft/ops/cpu/token_tiles.h>

namespace torchgraft::ops::cpu {

TokenRuns token_runs(const Selection& selection, int64_t batch, int64_t tokens) {
  TORCH_INTERNAL_ASSERT(selection.kind != Selection::Kind::kBase,
                        "expected a selection with adapters, got base rows only");
  if (!selection.is_mixed()) {
    return {batch * tokens, {selection.slice}};
  }
  const at::Tensor rows = selection.rows.contiguous();
  const at::Tensor active = selection.active.contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const bool* is_active = active.const_data_ptr<bool>();
  TokenRuns runs{tokens, {}};
  for (int64_t b = 0; b < batch; ++b) {
    runs.slices.push_back(is_active[b] ? row[b] : -1);
  }
  return runs;
}

bool packs_tokens(int64_t row_tokens, int64_t columns) {
  // Fewer tokens leave lanes empty; fewer columns are not worth packing the tokens for.
  constexpr int64_t kTokens = 16;
  constexpr int64_t kColumns = 32;
  return row_tokens >= kTokens && columns >= kColumns;
}

void multiply(const DotProduct& job, int64_t row_tokens, int64_t columns) {
  const bool packs = packs_tokens(row_tokens, columns);
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(job.w_step == 1 || job.depth <= 1 || (packs && !job.w.is_bfloat16),
                                   "a weight in steps is read by the float32 kernel that packs tokens alone");
  TORCH_INTERNAL_ASSERT(job.init == nullptr || job.activation == FusedActivation::kIdentity,
                        "a product with an activation has no init, which kernels would add before or behind it");
  if (!packs) {
    kernels().dot_product(job);
    for (int64_t row = 0; row < job.rows && job.activation != FusedActivation::kIdentity; ++row) {
      kernels().activate(job.activation, job.y + row * job.y_stride, job.columns);
    }
  } else if (job.x_is_bfloat16 && job.w.is_bfloat16 && kernels().token_product_bfloat16 != nullptr) {
    kernels().token_product_bfloat16(job);
  } else {
    kernels().token_product(job);
  }
}

Numbers numbers_of(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return {};
  }
  return tensor.scalar_type() == at::kBFloat16 ? Numbers(tensor.const_data_ptr<at::BFloat16>())
                                               : Numbers(tensor.const_data_ptr<float>());
}

BankSlices::BankSlices(const at::Tensor& bank) {
  if (bank.defined() && bank.numel() > 0) {
    bank_ = bank.contiguous();
    first_ = numbers_of(bank_);
    size_ = bank_.numel() / bank_.size(0);
  }
}

}  // namespace torchgraft::ops::cpu
