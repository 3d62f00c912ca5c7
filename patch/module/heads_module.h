#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/compositions.h>

#include <torch/csrc/jit/api/module.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// Adds the submodule `heads` to the `adapters` submodule, if any adapter has a head. It holds banks [N, ...] of the
// weights in plan/head_weights.h, padded with zeros; a trainable adapter has its own in adapter_<name>. Its method
//   logits(hidden [B, S, H], token_mask: Optional[Tensor [B, S]], adapter_ids: Optional[Tensor [B]], active: int)
// gives [B, L], or [B, S, L] for tagging. L is the largest number of labels; columns that a row's head does not have
// are -inf. The method fails on rows whose adapter has no head, and on heads with and without pooling in one batch.
void add_heads(torch::jit::Module& adapters_module, const std::vector<Adapter>& adapters,
               const std::shared_ptr<torch::jit::CompilationUnit>& unit);

// Whose heads a module has: the adapters' and, where a composition has a head, behind them those of all compositions,
// in the order of their ids. A composition counts as trainable when `trains` says so of AdapterFusion layers that it
// uses.
std::vector<Adapter> head_owners(const std::vector<Adapter>& adapters,
                                 const std::vector<NamedComposition>& compositions,
                                 const std::function<bool(const std::string& fusion)>& trains);

// Whether a weight of a head is trained: all but the "out_bias" of a head without one.
bool is_learned(const HeadConfig& config, const std::string& name);

// Reads the heads of `adapters` back; and those of compositions, of a module with so many adapters.
void read_heads(const torch::jit::Module& adapters_module, std::vector<Adapter>& adapters);
void read_heads(const torch::jit::Module& adapters_module, size_t adapters,
                std::vector<NamedComposition>& compositions);

}  // namespace torchgraft
