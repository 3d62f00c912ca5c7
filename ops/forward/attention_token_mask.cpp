#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/registration/masked_score.h>

namespace torchgraft::ops {
namespace {

// The keys [B, S] that real queries see. `visible`: bool [B, S_q, S]. The last token is real, or sees those that are:
// padding lies behind the last query's own tokens, or before them. A real query sees real keys. So keys that only
// padding sees, such as the padding itself, do not count. Where the last query sees nothing, and in cross attention,
// every query counts.
at::Tensor seen_by_real_queries(const at::Tensor& visible) {
  const at::Tensor by_any = visible.any(-2);
  if (visible.size(-2) == 1 || visible.size(-2) != visible.size(-1)) {
    return by_any;
  }
  at::Tensor real = visible.select(-2, -1);
  for (at::Tensor before; !before.defined() || !at::equal(real, before);) {
    before = real;
    real = real.logical_or(visible.logical_and(real.unsqueeze(-1)).any(-2));
  }
  return at::where(real.any(-1, /*keepdim=*/true), real, by_any);
}

at::Tensor token_mask_forward(const TokenMaskArguments& args) {
  check(args);
  const at::IntArrayRef sizes = args.x.sizes().slice(0, 2);  // [B, S]
  if (!args.attn_mask.defined()) {
    return at::ones(sizes, args.x.options().dtype(at::kBool));
  }
  const at::Tensor& mask = args.attn_mask;
  at::Tensor visible = mask.scalar_type() == at::kBool ? mask : at::gt(mask, kMaskedScore);
  if (visible.dim() == 4) {  // [B, h, S_q, S]
    visible = visible.any(1);
  } else if (visible.dim() == 3) {  // [h, S_q, S]
    visible = visible.any(0);
  }
  return seen_by_real_queries(visible).expand(sizes).clone(at::MemoryFormat::Contiguous);
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("attention_token_mask", from_schema<TokenMaskArguments, token_mask_forward, decltype(attention_token_mask)>);
}

// The result is boolean: nothing to differentiate, and no reason to warn about it.
TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("attention_token_mask", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace torchgraft::ops
