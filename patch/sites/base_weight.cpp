#include <torchgraft/patch/sites/base_weight.h>

#include <torchgraft/patch/graph/linear_map.h>

#include <ATen/ATen.h>

#include <sstream>

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

std::string module_path(const WeightSource& source) {
  std::string path = source.path;
  const auto drop = [&path](const std::string& suffix) {
    const bool has_it = path.size() > suffix.size() && path.ends_with(suffix);
    path.resize(path.size() - (has_it ? suffix.size() : 0));
    return has_it;
  };
  if (source.packed) {
    while (drop("._packed_params") || drop("_packed_params")) {
    }
  } else if (!drop(".weight")) {
    drop("_weight");
  }
  return path;
}

WeightSource known_rows(const Value* weight, SymbolicShapes& shapes, const torch::jit::Module& root) {
  WeightSource source = weight_source(weight, root);
  if (!source.tensor.defined() || source.first_row) {
    return source;
  }
  const Node* unpack = weight->node();
  if (unpack->kind() != c10::prim::ListUnpack || !resolve_tensor(unpack->input()->node()->input(0), root).defined()) {
    return {};
  }
  int64_t rows = 0;
  for (size_t i = 0; i < weight->offset(); ++i) {
    const auto piece = shapes.shape(unpack->outputs()[i]);
    if (!piece || piece->empty() || !piece->front().is_constant()) {
      return {};
    }
    rows += piece->front().factor;
  }
  source.first_row = rows;
  return source;
}

BaseWeight base_weight(const LinearSite& site, const torch::jit::Module& module) {
  SymbolicShapes shapes(module);
  const Value* weight = linear_weight(site.node);
  const WeightSource source = known_rows(weight, shapes, module);
  const auto packed = source.packed ? packed_weight(source.packed) : std::nullopt;
  return {source.tensor, packed ? module_path(source) : source.path, is_stored_transposed(weight),
          source.first_row.value_or(0), packed ? packed->dtype : ""};
}

Value* insert_rows(torch::jit::Graph& graph, const BaseWeight& weight, const LinearSite& site, int64_t out_features) {
  Value* rows = nullptr;
  if (weight.path.empty()) {
    rows = graph.insertConstant(weight.tensor);
  } else {
    rows = graph.inputs()[0];
    std::istringstream path(weight.path);
    for (std::string name; std::getline(path, name, '.');) {
      rows = graph.insertGetAttr(rows, name);
    }
  }
  if (weight.is_transposed) {
    rows = graph.insert(c10::aten::t, {rows});
  }
  const int64_t first = weight.first_row + (site.is_part ? site.offset : 0);
  return graph.insert(c10::aten::narrow, {rows, 0, first, out_features});
}

}  // namespace torchgraft
