#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/config/head_config.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/structure.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// A task head with its weights: a state dict of the adapters library's head `saved_name`.
struct HeadSpec {
  HeadConfig config;
  StateDict weights;
  std::string saved_name;
};

// One adapter to graft.
struct AdapterSpec {
  std::string name;  // a Python identifier, not yet taken in the module
  AdapterConfig config;
  std::optional<StateDict> weights;   // an AdapterHub state dict; without it the adapter is freshly initialised
  std::string saved_name;             // the adapter's name inside `weights`; empty: the same as `name`
  bool trainable = false;             // see train.h; else it is frozen: a row of the banks
  std::optional<HeadSpec> head = {};  // see head.h

  const std::string& name_in_weights() const { return saved_name.empty() ? name : saved_name; }
};

struct GraftOptions {
  // "all": the gate is the mean over all tokens, as in the oracle. "unpadded": over the tokens that are not padding, so
  // that a row's output does not depend on how far its batch was padded.
  std::string gate_pooling = "all";
  // For "unpadded": the forward argument that is the token mask ([B, S], non-zero where a token is real). Empty: taken
  // from each attention's own mask.
  std::string token_mask_input;
  // The adapter that is active in the result; empty: the last of those grafted now.
  std::string active;
  // Places to use instead of those detected: what inspect() gives, edited. A grafted module remembers them.
  std::optional<Structure> sites;
  // Save and load the result in memory and compare it with the base where the initialisation implies equality.
  bool verify = true;
  // Make one op of a linear map and its LoRA or parallel bottleneck (insert/fuse_projections.h). A grafted module
  // remembers it.
  bool fuse = true;
};

// A copy of `module` with the adapters grafted on; `module` itself is unchanged. Its parameters are tensors of their
// own on the memory of the module's (graph/clone_module.h). A module that is already grafted keeps its adapters and
// gets the new ones added to its banks.
//
// The result has the methods
//   forward(..., adapter_ids: Optional[Tensor] = None)             as before; adapter_ids [B] int64, -1 = base model
//   forward_with_gates(..., adapter_ids: Optional[Tensor] = None)  -> (result, gates), with
//       gates: Dict[str, Dict[int, Dict[str, Tensor]]], gates[adapter][layer][location] of shape [rows of it, gates]
//   base_forward(...)                                              the base model, untouched
//   activate(name: str), deactivate(), active_adapter() -> Optional[str], adapter_names() -> List[str]
//   adapter_config(name: str) -> str                               the adapter's config as JSON
// and its parameters in the submodule `adapters`.
//
// Throws c10::Error (with module path and remedy) when no attention is found, a location does not exist, weights do not
// fit, a name is taken, or the config is not supported.
TORCHGRAFT_PATCH_API torch::jit::Module graft(const torch::jit::Module& module,
                                              const std::vector<AdapterSpec>& adapters,
                                              const GraftOptions& options = {});

// What the patcher sees in `module` (of a grafted module: in its base). Never throws for a module without attention:
// the result then has no layers and its near misses say why. With `sites`, what they
// make of it.
TORCHGRAFT_PATCH_API Structure inspect(const torch::jit::Module& module,
                                       const std::optional<Structure>& sites = std::nullopt);

}  // namespace torchgraft
