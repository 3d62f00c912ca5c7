#pragma once

#include <torchgraft/plan/adapter_weights.h>

#include <string>

namespace torchgraft {

// The inverse of adapter_hub_weights: a state dict with the keys of `model.save_adapter()` of adapters==1.3.0. Modules
// are named as the library names them in its BERT, T5, DeBERTa, ViT, ALBERT and DistilBERT families, known by the path
// of the query projection, and as in its BART, GPT-2 and LLaMA otherwise. LoRA on packed q, k, v is packed; prefixes
// are written as the MLP in `sources`, else as flat ones ("control_trans"): saved_config says so. On the CPU.
StateDict adapter_hub_state(const Plan& plan, const Structure& structure, const AdapterWeights& weights,
                            const Reparametrisation& sources, const std::string& name);

// `config` as it is saved without what its weights are computed from: flat=True in every prefix, phm_layer=False.
AdapterConfig ejected_config(AdapterConfig config);

// The same, but for what is in `sources`.
AdapterConfig saved_config(const AdapterConfig& config, const Reparametrisation& sources);

}  // namespace torchgraft
