#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/plan/module_weights.h>

namespace torchgraft {

// `config` of an adapter that is saved without the sources of its weights: flat=True in every prefix, phm_layer=False,
// and an ordinary LoRA for VeRA and MTL-LoRA.
AdapterConfig ejected_config(const AdapterConfig& config);

// The configuration that a directory has beside adapter_hub_state: what `sources` has keeps its form.
AdapterConfig saved_config(AdapterConfig config, const Reparametrisation& sources);

}  // namespace torchgraft
