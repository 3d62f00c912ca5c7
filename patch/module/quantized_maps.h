#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>

#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// A linear map of a canonical graph, and its weight in int8; or why it stays as it is.
struct QuantizedMap {
  torch::jit::Node* node = nullptr;
  std::string path;             // the module path of the weight; empty for a constant
  std::set<std::string> roles;  // "query", "ffn_in", ... of its layers; "other" outside of them
  int64_t out_features = 0;     // 0 when they are not known
  int64_t in_features = 0;
  std::string
      attribute;       // where the packed weight goes: "encoder.layer.0.output.dense._packed_params"; empty: a constant
  c10::IValue packed;  // None when the map stays as it is
  std::string kept;    // why it does; empty when it does not
};

// All linear maps of the graph in execution order, with the weights of those quantised that `skip` does not name, by
// role, by path or by the path of a module around them. One weight that several maps read is packed once.
//
// Weights get one scale for each row, symmetrically, as torch.ao.quantization's per_channel_dynamic_qconfig gives them.
//
// Throws c10::Error when an entry of `skip` names nothing.
std::vector<QuantizedMap> quantize_maps(torch::jit::Graph& graph, const GraphSites& sites,
                                        const torch::jit::Module& module, const std::vector<std::string>& skip);

}  // namespace torchgraft
