#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/registration/masked_score.h>

#include <string>

namespace torchgraft::ops {
namespace {

// The tokens [B, S] that those of `real` see, and what these see, and so on. `visible`: bool [B, S, S].
at::Tensor closure(at::Tensor real, const at::Tensor& visible) {
  for (at::Tensor before; !before.defined() || !at::equal(real, before);) {
    before = real;
    real = real.logical_or(visible.logical_and(real.unsqueeze(-1)).any(-2));
  }
  return real;
}

// One row's index [B] where `flags` [B, S] is last true; S - 1 where it never is.
at::Tensor last_true(const at::Tensor& flags) {
  const int64_t last = flags.size(-1) - 1;
  const at::Tensor index = at::where(flags, at::arange(last + 1, flags.options().dtype(at::kLong)), -1).amax(-1);
  return at::where(index < 0, last, index);
}

void check_one_text(const at::Tensor& row_is_ambiguous) {
  if (!row_is_ambiguous.any().item<bool>()) {
    return;
  }
  std::string message = kGroupsOfTokens;
  message.replace(message.find("{}"), 2, std::to_string(row_is_ambiguous.nonzero()[0].item<int64_t>()));
  TORCH_CHECK(false, message);
}

// The keys [B, S] that real queries see, and that padding alone does not. `visible`: bool [B, S, S].
//
// The last token that sees or is seen by another one is real, or sees those that are: padding stands by itself, or sees
// the text. What real tokens see is real. Where tokens see later ones, each is seen by another: what only sees itself,
// and the text, is padding. Groups of tokens apart from each other could each be the text.
at::Tensor text_of(const at::Tensor& visible) {
  const int64_t tokens = visible.size(-1);
  const at::Tensor itself = at::eye(tokens, visible.options());
  const at::Tensor others = visible.logical_and(itself.logical_not());
  const at::Tensor start = last_true(others.any(-1).logical_or(others.any(-2)));
  const at::Tensor at_start = at::arange(tokens, start.options()).eq(start.unsqueeze(-1));  // [B, S]
  const at::Tensor real = closure(at::where(at_start.unsqueeze(-1), visible, false).any(-2), visible);

  const at::Tensor among_real = others.logical_and(real.unsqueeze(-1)).logical_and(real.unsqueeze(-2));
  const at::Tensor sees_later = among_real.triu(1).any(-1).any(-1);  // [B]
  const at::Tensor stands_alone = visible.select(-2, -1).select(-1, -1).logical_and(start < tokens - 1);
  const at::Tensor elsewhere =
      others.any(-1).logical_and(visible.logical_and(real.unsqueeze(-2)).any(-1).logical_not());
  check_one_text(stands_alone.logical_and(sees_later.logical_not()).logical_or(elsewhere.any(-1)));
  return at::where(sees_later.unsqueeze(-1), among_real.any(-2), real);
}

// The keys [B, S] that count. Where the queries are not the keys' own tokens, every query counts, and where no token
// sees any.
at::Tensor seen_by_real_queries(const at::Tensor& visible) {
  const at::Tensor by_any = visible.any(-2);
  if (visible.size(-2) == 1 || visible.size(-2) != visible.size(-1)) {
    return by_any;
  }
  const at::Tensor real = text_of(visible.dim() == 2 ? visible.unsqueeze(0) : visible);
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
