#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <optional>

namespace torchgraft::ops {

// Which tokens an attention mask treats as real: bool [B, S], true where some head and some real query of row b may
// attend to key j. Real tokens see each other, directly or by others between them; what only padding sees is padding,
// on either side, and so is what sees nothing but itself beside the text. A token of padding behind a causal text that
// sees itself and the text looks like a real one.
// x [B, S, H] says for which rows and tokens; attn_mask as in scaled_dot_product_attention, broadcastable to [B, h,
// S_q, S]: bool (true = attend) or floating (added to the scores: masked when at most -9000, which covers -1e4, -1e9,
// finfo.min and -inf, and no position bias). Absent: all true. Not differentiable. Throws c10::Error when the mask
// does not broadcast, has another dtype, or lets a row fall into groups of tokens that do not see each other (several
// texts in a row, padding that sees padding): which of them is padding is not known.
TORCHGRAFT_API at::Tensor attention_token_mask(const at::Tensor& x,
                                               const std::optional<at::Tensor>& attn_mask = std::nullopt);

}  // namespace torchgraft::ops
