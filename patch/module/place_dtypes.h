#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/graft_spec.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>

#include <vector>

namespace torchgraft {

// LoRAs of a linear map have the dtype of its weight, which is that of its input and its result, also where the other
// adapters of the module have another: T5 keeps `wo` in float32 when the rest is float16. Where something may cast
// between the weight and the product (torch.autocast, traced or entered by the module) a LoRA keeps its dtype.

// Gives the LoRAs of `adapters` these dtypes. Throws c10::Error for one whose factors the modules of an adapter share
// (VeRA, MTL-LoRA), and so have one dtype, where its linear map has another.
void cast_to_places(std::vector<Adapter>& adapters, const GraphSites& sites, const torch::jit::Module& module);

// make_adapter() with `options`, and then cast_to_places(). What comes from a directory is rounded once.
Adapter make_placed_adapter(const AdapterSpec& spec, const GraphSites& sites, const torch::jit::Module& module,
                            const at::TensorOptions& options);

}  // namespace torchgraft
