#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/registration/masked_score.h>

namespace torchgraft::ops {
namespace {

at::Tensor token_mask_forward(const TokenMaskArguments& args) {
  check(args);
  const at::IntArrayRef sizes = args.x.sizes().slice(0, 2);  // [B, S]
  if (!args.attn_mask.defined()) {
    return at::ones(sizes, args.x.options().dtype(at::kBool));
  }
  const at::Tensor& mask = args.attn_mask;
  at::Tensor visible = mask.scalar_type() == at::kBool ? mask : at::gt(mask, kMaskedScore);
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
  return visible.expand(sizes).clone(at::MemoryFormat::Contiguous);
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("attention_token_mask", from_schema<TokenMaskArguments, token_mask_forward, decltype(attention_token_mask)>);
}

// The result is boolean: nothing to differentiate, and no reason to warn about it.
TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("attention_token_mask", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace torchgraft::ops
