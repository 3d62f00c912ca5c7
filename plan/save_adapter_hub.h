#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <string>

namespace torchgraft {

// The inverse of adapter_hub_weights: a state dict with the keys of `model.save_adapter()` of adapters==1.3.0. Modules
// are named as the library names them in its BERT, T5, DeBERTa, ViT, ALBERT and DistilBERT families, known by the path
// of the query projection, and as in its BART, GPT-2 and LLaMA otherwise. BEiT's paths are those of ViT: it is known by
// `attention_class`, the name of the class of the first attention ("transformers.models.beit.modeling_beit.
// BeitSelfAttention"; empty when unknown). LoRA on packed q, k, v is packed;
// prefixes are written as the MLP in `sources`, else as flat ones ("control_trans"), Compacter's projections as their
// factors in `sources`, else as ordinary ones, VeRA and MTL-LoRA as theirs, else as LoRA: saved_config says so. Tensors
// are on the CPU.
StateDict adapter_hub_state(const Plan& plan, const Structure& structure, const AdapterWeights& weights,
                            const Reparametrisation& sources, const std::string& name,
                            const std::string& attention_class = "");

// The path of the ModuleDict of a layer's bottlenecks at `site`: "bert.encoder.layer.0.output.adapters".
std::string bottleneck_container(const std::string& site, const Layer& layer, const std::string& attention_class);

}  // namespace torchgraft
