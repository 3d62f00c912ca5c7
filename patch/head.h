#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/patch/graft.h>

#include <string>

namespace torchgraft {

// Returns a copy in which the adapter `name` has a head with fresh weights, in place of any earlier head. The head is
// trainable if the adapter is. A composition with a Fuse can have a head, too, which is trained with its AdapterFusion
// layers. `token_mask_input` names the argument of forward that says which tokens are real ([B,
// S], non-zero = real), for pooling; all heads of a module share it. Empty: "attention_mask", or
// "decoder_attention_mask" for a model with cross attention; if forward has no such argument, all tokens are real.
//
// Modules with a head have the method
//   forward_with_head(..., adapter_ids: Optional[Tensor] = None) -> Tensor
// with forward's arguments: logits [B, L], for tagging [B, S, L]. In a mixed batch L is the largest number of labels of
// all heads, and columns that a row's head does not have are -inf. The head reads forward's result: a Tensor [B, S, H],
// the first Tensor of a tuple, or the entry "last_hidden_state" of a dict.
TORCHGRAFT_PATCH_API torch::jit::Module add_head(const torch::jit::Module& module, const std::string& name,
                                                 const HeadConfig& config, const std::string& token_mask_input = "");

// The same with the weights of a head of the adapters library.
TORCHGRAFT_PATCH_API torch::jit::Module load_head(const torch::jit::Module& module, const std::string& name,
                                                  const HeadSpec& head);

// Returns a copy in which the adapter has no head. Throws c10::Error when it had none.
TORCHGRAFT_PATCH_API torch::jit::Module remove_head(const torch::jit::Module& module, const std::string& name);

// The head's configuration as JSON (head_config_to_json); empty when the adapter has none.
TORCHGRAFT_PATCH_API std::string head_config(const torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
