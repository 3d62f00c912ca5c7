#pragma once

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// weight_source(), whose first row is also found where the graph computes the sizes of a split from the width of an
// input, as torch.nn does. Nothing is defined when it is not found.
WeightSource known_rows(const torch::jit::Value* weight, SymbolicShapes& shapes, const torch::jit::Module& root);

// The path of the module that has the weight: "encoder.layer.0.attention.self.query" for "...query.weight", and
// "layers.0.self_attn.in_proj" for "layers.0.self_attn.in_proj_weight". Every "_packed_params" at the end is cut
// off: torch.ao.nn writes it twice. Empty for a constant.
std::string module_path(const WeightSource& source);

// The parameter of the base that a linear map reads.
struct BaseWeight {
  at::Tensor tensor;           // undefined when the weight, or which of its rows, is computed at run time, or packed
  std::string path;            // "encoder.layer.0.attention.self.query.weight"; empty for a constant. Of a packed one
                               // "encoder.layer.0.attention.self.query"
  bool is_transposed = false;  // stored as [in, out] (Conv1D)
  int64_t first_row = 0;
  std::string packed;  // "int8", "float16": of a weight that an object holds, rounded; empty for a tensor

  // A view [out_features, in] of the rows of `site` in `whole`, a tensor of the parameter's shape.
  at::Tensor rows(const at::Tensor& whole, const LinearSite& site, int64_t out_features) const;
};

BaseWeight base_weight(const LinearSite& site, const torch::jit::Module& module);

// The same rows as a value, read at the graph's insert point. `weight` is base_weight(site).
torch::jit::Value* insert_rows(torch::jit::Graph& graph, const BaseWeight& weight, const LinearSite& site,
                               int64_t out_features);

}  // namespace torchgraft
