#pragma once

#include <torchgraft/patch/module/adapter_bank.h>

#include <ATen/core/Tensor.h>

namespace torchgraft {

// Computes the logits [B, L], for tagging [B, S, L], as forward_with_head does for rows of one adapter, but outside a
// graph and without dropout. hidden is [B, S, H]. token_mask [B, S] is non-zero where a token is real; undefined: all
// tokens are.
at::Tensor head_logits(const Head& head, const at::Tensor& hidden, const at::Tensor& token_mask);

}  // namespace torchgraft
