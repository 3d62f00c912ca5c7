#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <optional>
#include <vector>

namespace torchgraft {

struct InsertOptions {
  GatePoolings poolings;                   // of all adapters
  std::optional<size_t> token_mask_input;  // the graph input that is the token mask; else each attention's own mask
  std::vector<NamedComposition> compositions = {};  // of `adapters`; the graph of a module without any is untouched
  std::vector<AdapterFusion> fusions = {};          // likewise
  const std::vector<Adapter>* adapters = nullptr;   // those of the slots, where there are compositions
  // Of a pool: how many rows its banks have. Ids of compositions come behind these, and the attribute composition_parts
  // of the `adapters` submodule tells which row each adapter in a composition stands for.
  std::optional<int64_t> pool_rows = std::nullopt;
  // Arguments of forward, likeliest first, that may be run to find out where rows of a Parallel can be repeated.
  std::vector<std::vector<c10::IValue>> examples = {};
};

// Inserts one torchgraft:: op per run into `graph`, whose sites are `sites`, and one more wherever a projection with a
// LoRA is applied outside its attention. Returns the number of ops. Adds the input `adapter_ids: Tensor?`, and makes
// the graph return (its result, gates: Tensor[]), one gate per run in the order of gated_runs(). `module`, the graph's
// `self`, must have the submodule `adapters` with the slots.
size_t insert_adapters(const std::shared_ptr<torch::jit::Graph>& graph, const GraphSites& sites,
                       const std::vector<Slot>& slots, const std::vector<SlotRun>& runs,
                       const torch::jit::Module& module, const InsertOptions& options);

}  // namespace torchgraft
