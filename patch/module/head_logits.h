#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <ATen/core/Tensor.h>

#include <set>
#include <string>

namespace torchgraft {

// How logits follow from hidden states, once, as TorchScript methods: heads_module.h defines them beside the weights of
// its heads, head_logits() on a module without any. The one to call is
//   head_logits(hidden [B, S, H], token_mask: Optional[Tensor [B, S]], pooling: str, layers: int, activation: str,
//               dropout: float, dense_weight, dense_bias, out_weight, out_bias) -> Tensor
// with weights as in plan/head_weights.h; pooling "none" is tagging. It knows the non-linearities `activations`; any
// other name is the identity. Dropout acts if the attribute `training` says so.
std::string head_methods(const std::set<std::string>& activations);

// HeadConfig::pooling, or "none" of a head that tags every token.
std::string head_pooling(const HeadConfig& config);

// HeadConfig::activation_function, or "linear".
std::string head_activation(const HeadConfig& config);

// What forward_with_head makes of the rows of one adapter, outside a graph and without dropout. hidden [B, S, H];
// token_mask [B, S], non-zero where a token is real, or undefined: all are. Logits [B, L], for tagging [B, S, L].
at::Tensor head_logits(const Head& head, const at::Tensor& hidden, const at::Tensor& token_mask);

}  // namespace torchgraft
