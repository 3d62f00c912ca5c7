#pragma once

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// The parameter of the base that a linear map reads.
struct BaseWeight {
  at::Tensor tensor;           // undefined when the weight is computed at run time
  std::string path;            // "encoder.layer.0.attention.self.query.weight"; empty for a constant
  bool is_transposed = false;  // stored as [in, out] (Conv1D)
  int64_t first_row = 0;

  // A view [out_features, in] of the rows of `site` in `whole`, a tensor of the parameter's shape.
  at::Tensor rows(const at::Tensor& whole, const LinearSite& site, int64_t out_features) const;
};

BaseWeight base_weight(const LinearSite& site, const torch::jit::Module& module);

// The same rows as a value, read at the graph's insert point. `weight` is base_weight(site).
torch::jit::Value* insert_rows(torch::jit::Graph& graph, const BaseWeight& weight, const LinearSite& site,
                               int64_t out_features);

}  // namespace torchgraft
