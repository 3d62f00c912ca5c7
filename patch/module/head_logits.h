#pragma once

#include <torchgraft/patch/module/adapter_bank.h>

#include <ATen/core/Tensor.h>

namespace torchgraft {

// What forward_with_head makes of the rows of one adapter, outside a graph and without dropout. hidden [B, S, H];
// token_mask [B, S], non-zero where a token is real, or undefined: all are. Logits [B, L], for tagging [B, S, L].
at::Tensor head_logits(const Head& head, const at::Tensor& hidden, const at::Tensor& token_mask);

}  // namespace torchgraft
