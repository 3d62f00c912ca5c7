#include <torchgraft/patch/base_weight.h>

#include <ATen/ATen.h>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

// Whether `weight`, [out, in] as a linear reads it, is stored as [in, out].
bool is_stored_transposed(const Value* weight) {
  bool result = false;
  for (const Node* node = weight->node(); is_layout(node) || is_aten(node, {"t", "numpy_T"});
       node = node->input(0)->node()) {
    result = result != is_aten(node, {"t", "numpy_T", "transpose", "permute"});
  }
  return result;
}

}  // namespace

at::Tensor BaseWeight::rows(const at::Tensor& whole, const LinearSite& site, int64_t out_features) const {
  const at::Tensor as_read = is_transposed ? whole.t() : whole;
  return as_read.narrow(0, first_row + (site.is_part ? site.offset : 0), out_features);
}

BaseWeight base_weight(const LinearSite& site, const torch::jit::Module& module) {
  const WeightSource source = weight_source(site.node->input(1), module);
  return {source.tensor, !source.path.empty(), is_stored_transposed(site.node->input(1)), source.first_row};
}

}  // namespace torchgraft
