#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

at::Tensor attention_token_mask_meta(const at::Tensor& x, const std::optional<at::Tensor>& attn_mask) {
  check_attention_token_mask(x, or_undefined(attn_mask));
  return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options().dtype(at::kBool));
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) { m.impl("attention_token_mask", TORCH_FN(attention_token_mask_meta)); }

}  // namespace
}  // namespace torchgraft::ops
