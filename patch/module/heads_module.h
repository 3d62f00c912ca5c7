#pragma once

#include <torchgraft/patch/module/adapter_bank.h>

#include <torch/csrc/jit/api/module.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// The submodule `heads` of the `adapters` submodule, if any adapter has a head: banks of the weights in
// plan/head_weights.h, [N, ...], padded with zeros; a trainable adapter has its own in adapter_<name>. Its method
//   logits(hidden [B, S, H], token_mask: Optional[Tensor [B, S]], adapter_ids: Optional[Tensor [B]], active: int)
// gives [B, L], or [B, S, L] for tagging, L being the most labels of a head; a row's columns behind its own labels are
// -inf. It fails on rows whose adapter has no head, and on rows with and without pooling in one batch.
void add_heads(torch::jit::Module& adapters_module, const std::vector<Adapter>& adapters,
               const std::shared_ptr<torch::jit::CompilationUnit>& unit);

// "out_bias" of a head without one is not trained.
bool is_learned(const HeadConfig& config, const std::string& name);

// The heads of `adapters`, read back.
void read_heads(const torch::jit::Module& adapters_module, std::vector<Adapter>& adapters);

}  // namespace torchgraft
