#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/check.h>

#include <limits>

namespace torchgraft::ops {
namespace {

// A float mask value at or below this hides a key: half of the dtype's lowest finite value.
double hidden_below(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return std::numeric_limits<double>::lowest() / 2;
    case at::kFloat:
      return std::numeric_limits<float>::lowest() / 2;
    case at::kBFloat16:
      return static_cast<float>(std::numeric_limits<c10::BFloat16>::lowest()) / 2;
    case at::kHalf:
      return static_cast<float>(std::numeric_limits<c10::Half>::lowest()) / 2;
    default:
      TORCH_CHECK(
          false, "attention_token_mask: expected attn_mask of dtype Float, Double, BFloat16, Half or Bool, got ", type);
  }
}

at::Tensor attention_token_mask_composite(const at::Tensor& x, const std::optional<at::Tensor>& attn_mask) {
  const at::Tensor mask = or_undefined(attn_mask);
  check_attention_token_mask(x, mask);
  const auto options = x.options().dtype(at::kBool);
  if (!mask.defined()) {
    return at::ones({x.size(0), x.size(1)}, options);
  }
  at::Tensor visible = mask.scalar_type() == at::kBool ? mask : at::gt(mask, hidden_below(mask.scalar_type()));
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
