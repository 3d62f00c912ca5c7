#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <optional>

namespace torchgraft::ops {

// Which tokens an attention mask treats as real: bool [B, S], true where some head and some real query of row b may
// attend to key j. The text is found from its last token: the last one that sees another token or is seen by one, then
// all that it sees, all that these see, and so on. (That token is real, or is padding that sees the text.) All others
// must be padding, which sees the text, itself, nothing, or everything. One token of padding
// behind a causal text that sees itself and the text looks like a real one.
// x [B, S, H] says for which rows and tokens; attn_mask as in scaled_dot_product_attention, broadcastable to [B, h,
// S_q, S]: bool (true = attend) or floating (added to the scores: masked when at most -9000, which covers -1e4, -1e9,
// finfo.min and -inf, and no position bias). Absent: all true. Not differentiable. Throws c10::Error when the mask
// does not broadcast, has another dtype, or does not say which tokens are padding: several texts in a row, padding that
// sees padding.
TORCHGRAFT_API at::Tensor attention_token_mask(const at::Tensor& x,
                                               const std::optional<at::Tensor>& attn_mask = std::nullopt);

}  // namespace torchgraft::ops
