#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/config/head_config.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/structure.h>

#include <ATen/core/ivalue.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

// What graft() is asked for.
namespace torchgraft {

// A task head with its weights: a state dict of the adapters library's head `saved_name`.
struct HeadSpec {
  HeadConfig config;
  StateDict weights;
  std::string saved_name;
};

// One adapter to graft.
struct AdapterSpec {
  std::string name;  // any text without dots, not yet taken in the module
  AdapterConfig config;
  std::optional<StateDict> weights;   // an AdapterHub state dict; without it the adapter is freshly initialised
  std::string saved_name;             // the adapter's name inside `weights`; empty: the same as `name`
  bool trainable = false;             // see train.h; else it is frozen: a row of the banks
  std::optional<HeadSpec> head = {};  // see head.h
  // The heads of keys and values that its prefixes were made for, where its directory says it: prefixes for more or
  // fewer heads have as many numbers.
  std::optional<int64_t> prefix_heads = {};

  const std::string& name_in_weights() const { return saved_name.empty() ? name : saved_name; }
};

// How graft() works. The defaults serve most models.
struct GraftOptions {
  // Over which tokens the gates of these adapters are means: "all" or "unpadded" (config/gate_pooling.h). Empty: as
  // each adapter's configuration says, which for a directory of AdapterHub is "all". A TORCH_WARN names a trained
  // adapter that says otherwise.
  std::string gate_pooling;
  // For "unpadded": the forward argument that is the token mask ([B, S], non-zero where a token is real). Empty: taken
  // from each attention's own mask. All adapters of a module share it.
  std::string token_mask_input;
  // The adapter that is active in the result; empty: the last of those grafted now.
  std::string active;
  // Sites to use instead of the detected ones: an edited result of inspect(). A grafted module remembers them.
  std::optional<Structure> sites;
  // Check the result: well-formed graphs, the planned ops, saving and loading in memory (insert/verify.h), and the same
  // numbers as the base where no adapter acts (module/verify_results.h).
  bool verify = true;
  // Make one op of a linear map and its LoRA or parallel bottleneck (insert/fuse_projections.h). A grafted module
  // remembers it.
  bool fuse = true;
  // Graft fresh adapters also where some attention was not recognised and gets none. Layers are then numbered without
  // it, so that the adapter fits no other copy of the model. With false that is an error. Edited `sites` say it, too. A
  // grafted module remembers it.
  bool allow_partial = false;
  // Names that the base gets in the result, where it has one that grafting adds: an attribute "adapters", an argument
  // "adapter_ids" of forward, a method "activate" and the like. Old name to new one. A grafted module remembers them;
  // ungraft() gives the old ones back.
  std::map<std::string, std::string> rename = {};
  // For verify: arguments of forward, in its order; those left out at the end have their defaults. nullopt: they are
  // made up where the signature and the graph allow; where not, a TORCH_WARN says that nothing was compared.
  std::optional<std::vector<c10::IValue>> example = {};
};

}  // namespace torchgraft
