#include <torchgraft/patch/module/head_logits.h>

#include <torchgraft/activations/activation.h>

#include <ATen/ATen.h>

namespace torchgraft {
namespace {

// [B, S, H] -> [B, H], or [B, S, H] where every token has a result.
at::Tensor pooled(const HeadConfig& config, const at::Tensor& hidden, const at::Tensor& token_mask) {
  if (config.head_type == "tagging") {
    return hidden;
  }
  if (config.pooling == "first") {
    return hidden.select(1, 0);
  }
  const at::Tensor keep = token_mask.defined()
                              ? token_mask.ne(0)
                              : at::ones({hidden.size(0), hidden.size(1)}, hidden.options().dtype(at::kBool));
  if (config.pooling == "mean") {
    const at::Tensor total = hidden.masked_fill(keep.logical_not().unsqueeze(-1), 0.0).sum(1);
    return total / keep.sum(1).clamp_min(1).unsqueeze(-1).to(hidden.scalar_type());
  }
  TORCH_INTERNAL_ASSERT(config.pooling == "last", "unknown pooling ", config.pooling);
  const at::Tensor last = at::where(keep, at::arange(hidden.size(1), keep.options().dtype(at::kLong)), 0).amax(1);
  return hidden.gather(1, last.view({-1, 1, 1}).expand({-1, 1, hidden.size(2)})).squeeze(1);
}

}  // namespace

at::Tensor head_logits(const Head& head, const at::Tensor& hidden, const at::Tensor& token_mask) {
  TORCH_CHECK(hidden.dim() == 3, "head_logits: expected hidden states [B, S, H], got ", hidden.sizes());
  at::Tensor x = pooled(head.config, hidden, token_mask);
  for (int64_t layer = 0; layer < head.config.layers - 1; ++layer) {
    x = at::linear(x, head.weights.at("dense_weight")[layer], head.weights.at("dense_bias")[layer]);
    if (head.config.activation_function) {
      x = find_activation(*head.config.activation_function).forward(x);
    }
  }
  return at::linear(x, head.weights.at("out_weight"), head.weights.at("out_bias"));
}

}  // namespace torchgraft
