#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <optional>

namespace torchgraft::ops {

// Which tokens an attention mask treats as real: bool [B, S], true where some head and some real query of row b may
// attend to key j. The last query is real or sees what is real, and so does what it sees, and so on; what only padding
// sees is padding, on either side. Rows that hold several texts which do not see each other are not told from padding.
// x [B, S, H] says for which rows and tokens; attn_mask as in scaled_dot_product_attention, broadcastable to [B, h,
// S_q, S]: bool (true = attend) or floating (added to the scores: masked when at most -9000, which covers -1e4, -1e9,
// finfo.min and -inf, and no position bias). Absent: all true. Not differentiable. Throws c10::Error when the mask
// does not broadcast or has another dtype.
TORCHGRAFT_API at::Tensor attention_token_mask(const at::Tensor& x,
                                               const std::optional<at::Tensor>& attn_mask = std::nullopt);

}  // namespace torchgraft::ops
