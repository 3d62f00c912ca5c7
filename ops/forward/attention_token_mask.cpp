#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/registration/masked_score.h>
#include <torchgraft/registration/token_mask_error.h>

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

void check_text_is_known(const at::Tensor& row_is_ambiguous) {
  if (!row_is_ambiguous.any().item<bool>()) {
    return;
  }
  std::string message = kTextIsNotKnown;
  message.replace(message.find("{}"), 2, std::to_string(row_is_ambiguous.nonzero()[0].item<int64_t>()));
  TORCH_CHECK(false, message);
}

at::Tensor some(const at::Tensor& flags) { return flags.any(-1, /*keepdim=*/true); }
at::Tensor how_many(const at::Tensor& flags) { return flags.sum(-1, /*keepdim=*/true); }

// Padding [B, S] whose queries see everything, as models let those that would see nothing. `visible`: bool [B, S, S].
// The last query of a causal text sees everything, too; where it is the only one it is no padding.
at::Tensor sees_all(const at::Tensor& visible) {
  const at::Tensor all = visible.all(-1);
  const at::Tensor others = ~all;
  const at::Tensor are_seen = some((visible & others.unsqueeze(-1) & all.unsqueeze(-2)).any(-1));
  return all & some(others) & ~are_seen & (how_many(all).gt(1) | others.select(-1, -1).unsqueeze(-1));
}

// The text [B, S]: the tokens that real ones see. `shown`: bool [B, S, S].
//
// The search begins at the last token that another one sees, or that sees another one: it is real, or sees what is
// real. All that it reaches is the text. Other tokens must be padding, which sees the text, itself, nothing, or
// everything. Where no token of the text sees the start but itself, the start is the end of a causal text, or padding
// that sees the text: it is padding if other padding behind the text does the same.
at::Tensor text_of(const at::Tensor& shown) {
  const at::Tensor blind = sees_all(shown);  // [B, S], as all below without another shape
  const at::Tensor visible = shown & ~blind.unsqueeze(-1) & ~blind.unsqueeze(-2);  // [B, S, S]
  const at::Tensor positions = at::arange(visible.size(-1), visible.options().dtype(at::kLong));
  const at::Tensor others = visible & positions.unsqueeze(-1).ne(positions);  // [B, S, S]
  const at::Tensor itself = visible.diagonal(0, -2, -1);
  const at::Tensor linked = others.any(-1) | others.any(-2);
  const at::Tensor has_links = some(linked);
  const at::Tensor start = at::where(has_links, linked, itself).mul(positions).amax(-1, /*keepdim=*/true);
  const at::Tensor at_start = positions.eq(start);
  const at::Tensor real = closure((visible & at_start.unsqueeze(-1)).any(-2), visible);
  const at::Tensor rest = real & ~at_start;

  const at::Tensor padding = ~real;
  const at::Tensor sees_padding = (others & padding.unsqueeze(-2)).any(-1);
  const at::Tensor sees_text_and_itself = padding & itself & others.any(-1) & ~sees_padding;
  const at::Tensor behind_rest = positions.gt(at::where(rest, positions, -1).amax(-1, /*keepdim=*/true));
  const at::Tensor seen_by_rest = (others & rest.unsqueeze(-1)).any(-2);
  const at::Tensor start_is_unseen = some(real & at_start & ~seen_by_rest);  // [B, 1]
  const at::Tensor start_is_padding = start_is_unseen & some(rest) & some(sees_text_and_itself & behind_rest);

  const at::Tensor rest_is_seen = how_many(rest).gt(1) & ~some(rest & ~seen_by_rest);
  const at::Tensor one_alone_behind = how_many(itself & ~linked & positions.gt(start)).eq(1);
  const at::Tensor first = at::where(real, positions, positions.size(0)).amin(-1, /*keepdim=*/true);
  check_text_is_known((some(padding & sees_padding) |                                               // groups apart
                       (start_is_unseen & ~start_is_padding & (rest_is_seen | one_alone_behind)) |  // end or padding
                       (~has_links & how_many(itself).gt(1)) |                                      // each for itself
                       some(blind & positions.gt(first) & positions.lt(start)))                     // amid the text
                          .squeeze(-1));
  return at::where(start_is_padding, rest, real);
}

// The keys [B, S] that count. Every query counts where all see the same, where no token sees any, and where the queries
// are not the keys' own tokens.
at::Tensor seen_by_real_queries(const at::Tensor& visible) {
  const at::Tensor by_any = visible.any(-2);
  if (visible.size(-2) < 2 || visible.size(-2) != visible.size(-1) ||
      at::equal(visible, visible.narrow(-2, 0, 1).expand_as(visible))) {
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
