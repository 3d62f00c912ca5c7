#pragma once

#include <torchgraft/patch/graft_spec.h>
#include <torchgraft/patch/inspect.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <vector>

namespace torchgraft {

// Returns a copy of `module` with the adapters grafted on; `module` stays as it is. The copy's parameters share the
// memory of the module's (graph/clone_module.h). A module that is grafted already keeps its adapters and gets the new
// ones beside them.
//
// The result has the methods
//   forward(..., adapter_ids: Optional[Tensor] = None)             as before; adapter_ids [B] int64, -1 = base model
//   forward_with_gates(..., adapter_ids: Optional[Tensor] = None)  -> (result, gates), with
//       gates: Dict[str, Dict[int, Dict[str, Tensor]]], gates[adapter][layer][location]: [the adapter's rows, gates]
//   base_forward(...)                                              the base, untouched
//   activate(name: str), deactivate(), active_adapter() -> Optional[str], adapter_names() -> List[str]
//   adapter_config(name: str) -> str                               the adapter's config as JSON
// and its parameters in the submodule `adapters`.
//
// Throws c10::Error (with module path and remedy) when no attention is found, a layer lacks a location, weights do not
// fit, a name is taken, or the config is not supported.
TORCHGRAFT_PATCH_API torch::jit::Module graft(const torch::jit::Module& module,
                                              const std::vector<AdapterSpec>& adapters,
                                              const GraftOptions& options = {});

}  // namespace torchgraft
