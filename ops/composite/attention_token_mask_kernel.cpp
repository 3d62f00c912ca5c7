#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

// A float mask value at or below this hides a key. Models write -1e4, -1e9, finfo.min or -inf for "masked"; relative
// position biases and ALiBi stay above -2e3 for any length in use.
constexpr double kHiddenBelow = -9e3;

at::Tensor attention_token_mask_composite(const at::Tensor& x, const std::optional<at::Tensor>& attn_mask) {
  const at::Tensor mask = or_undefined(attn_mask);
  check_attention_token_mask(x, mask);
  const auto options = x.options().dtype(at::kBool);
  if (!mask.defined()) {
    return at::ones({x.size(0), x.size(1)}, options);
  }
  at::Tensor visible = mask.scalar_type() == at::kBool ? mask : at::gt(mask, kHiddenBelow);
  visible = visible.any(-2);  // over queries: [.., S]
  switch (mask.dim()) {
    case 4:  // [B, h, S_q, S]
      visible = visible.any(1);
      break;
    case 3:  // [h, S_q, S]
      visible = visible.any(0);
      break;
    default:  // [S_q, S]
      break;
  }
  return visible.expand({x.size(0), x.size(1)}).clone(at::MemoryFormat::Contiguous);
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) { m.impl("attention_token_mask", TORCH_FN(attention_token_mask_composite)); }
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) { m.impl("attention_token_mask", TORCH_FN(attention_token_mask_composite)); }

}  // namespace
}  // namespace torchgraft::ops
