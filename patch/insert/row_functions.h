#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// TorchScript source of the functions below, which make the plain ATen code around the ops. decompose_adapters appends
// functions of its own.
const std::string& row_source();

// Inserts calls of these functions at the graph's insert point. Rows use the adapters that `adapter_ids` (Tensor?)
// gives them, or all of them `adapter` (int) when adapter_ids is None; -1 is the base.
class RowFunctions {
 public:
  RowFunctions(torch::jit::Graph& graph, torch::jit::Value* adapter_ids, torch::jit::Value* adapter)
      : graph_(graph), adapter_ids_(adapter_ids), adapter_(adapter) {}

  // Throws, on behalf of `op`, when adapter_ids are no int64 [B] in [-1, N), with B from x [B, ...] and N from bank
  // [N, ...]. Where no op of torchgraft reads the ids, nothing else checks them.
  void check_ids(const std::string& op, torch::jit::Value* x, torch::jit::Value* bank);

  // Layer norm of x [B, S, H] with each row's own weight and bias (banks [N, H]); epsilon 1e-5, as nn.LayerNorm has.
  torch::jit::Value* normed(torch::jit::Value* x, torch::jit::Value* weight, torch::jit::Value* bias);

  // A gate [B, G] as the ops compute it, from x [B, S, I]; all others may be None.
  torch::jit::Value* pooled(torch::jit::Value* x, torch::jit::Value* gate_weight, torch::jit::Value* gate_bias,
                            torch::jit::Value* token_mask);

  // mask (bool [B, S]), and all tokens of the rows whose adapter pools its gates over all (pools_all: bool [N + 1], the
  // last for rows without an adapter, as id -1 counts from the end: no other thread writes what such a row reads).
  torch::jit::Value* pooled_tokens(torch::jit::Value* mask, torch::jit::Value* pools_all);

  // An attention mask, or None, under which such rows of x [B, S, H] see all tokens: whatever stands there,
  // attention_token_mask can read it. The result is bool.
  torch::jit::Value* shown_to_whole_rows(torch::jit::Value* mask, torch::jit::Value* x, torch::jit::Value* pools_all);

  // The same for rows whose adapter has no ReFT at any position: no bank of positions [N, 2] has some for it.
  torch::jit::Value* shown_without_positions(torch::jit::Value* mask, torch::jit::Value* x,
                                             at::ArrayRef<torch::jit::Value*> positions);

  // (IA)^3: base [B, S, O] times the row's vector (bank [N, O, 1]), scaling (bank [N]) and gate [B, 1].
  torch::jit::Value* scaled(torch::jit::Value* base, torch::jit::Value* vector, torch::jit::Value* scaling,
                            torch::jit::Value* gate);

  // x [B, S, O] plus the row's vector (bank [N, O]).
  torch::jit::Value* shifted(torch::jit::Value* x, torch::jit::Value* bias);

  // For tokens (int64 [B, S]) their columns of each row's matrix (bank [N, r, V]), [B, S, r], and for gated_lora, which
  // leaves out rows without an adapter, unit matrices in the place of this bank, [N, r, r].
  std::pair<torch::jit::Value*, torch::jit::Value*> looked_up(torch::jit::Value* lora_a, torch::jit::Value* tokens);

  // DoRA: (x - fixed) * magnitude / weight_norm + fixed, for x [B, S, O] and banks [N, O].
  torch::jit::Value* with_magnitude(torch::jit::Value* x, torch::jit::Value* magnitude, torch::jit::Value* weight_norm,
                                    torch::jit::Value* fixed);

  // x at the positions [N, 2] of ReFT of each row's adapter, else `other`; both [B, S, H]. token_mask may be None.
  torch::jit::Value* at_positions(torch::jit::Value* positions, torch::jit::Value* token_mask, torch::jit::Value* x,
                                  torch::jit::Value* other);

  // x where the row's adapter is `present` (bool [N]), else `other`; both [B, S, H].
  torch::jit::Value* choose(torch::jit::Value* present, torch::jit::Value* x, torch::jit::Value* other);

 private:
  torch::jit::Value* call(const std::string& name, std::vector<torch::jit::Value*> arguments);

  torch::jit::Graph& graph_;
  torch::jit::Value* adapter_ids_;
  torch::jit::Value* adapter_;
};

}  // namespace torchgraft
