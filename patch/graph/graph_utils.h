#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

// Small questions about a graph that every pass asks.
namespace torchgraft {

// An attribute reached from the graph's `self` by prim::GetAttr only: the module path ("encoder.layer.0") and its
// value.
struct ModuleAttribute {
  std::string path;
  c10::IValue value;
};

// Follows prim::GetAttr from `value` back to the graph's first input; nullopt when the chain starts elsewhere.
std::optional<ModuleAttribute> resolve_attribute(const torch::jit::Value* value, const torch::jit::Module& root);

// The tensor behind a prim::Constant or a parameter of `root`; undefined when `value` is neither.
at::Tensor resolve_tensor(const torch::jit::Value* value, const torch::jit::Module& root);

// The parameter or constant that a linear map reads its weight from: all of it, or some rows (a packed in_proj_weight
// is split before its three products), perhaps transposed or reshaped. `tensor` is all of it, and undefined when the
// weight is computed in another way, or packed (linear_map.h): then `packed` is the object that holds it. `path` is
// empty for a constant. `first_row` is nullopt when the graph computes it: see known_rows() in sites/base_weight.h.
struct WeightSource {
  at::Tensor tensor;
  std::string path;
  std::optional<int64_t> first_row = 0;
  bool is_part = false;
  c10::intrusive_ptr<c10::ivalue::Object> packed = {};

  bool is_computed() const { return !tensor.defined() && !packed; }
  // Equal for two linear maps that have one weight; null when it is computed.
  const void* identity() const;
};
WeightSource weight_source(const torch::jit::Value* weight, const torch::jit::Module& root);

// The constant behind `value`, seen through prim::NumToTensor and aten::Int (traced graphs wrap sizes in them).
std::optional<c10::IValue> resolve_constant(const torch::jit::Value* value);
std::optional<int64_t> constant_int(const torch::jit::Value* value);
std::optional<double> constant_double(const torch::jit::Value* value);
bool is_none(const torch::jit::Value* value);

// "torch.nn.modules.activation.MultiheadAttention" for the class
// "__torch__.torch.nn.modules.activation.___torch_mangle_4.MultiheadAttention".
std::string demangled_name(const c10::TypePtr& type);

// True for a node of kind `aten::<name>` for one of `names`, with or without the in-place underscore.
bool is_aten(const torch::jit::Node* node, std::initializer_list<const char*> names);

// True for an aten op whose name ends in the underscore: one that writes into its first operand.
bool is_in_place(const torch::jit::Node* node);

bool is_tensor(const torch::jit::Value* value);

// add(x, y) or sub(x, y) without a factor of y.
bool has_unit_alpha(const torch::jit::Node* sum);

// True for x[:], as a trace records it for each dimension before the one that is cut.
bool is_whole_slice(const torch::jit::Node* node);

// True when `node` stands in `block`, however deep.
bool is_inside(const torch::jit::Node* node, const torch::jit::Block* block);

// True for an op on one tensor that computes each element from that element alone: activations, dropout, casts.
bool is_elementwise(const torch::jit::Node* node);

// Calls `visit` for every node, sub-blocks included, in execution order. `visit` may destroy its node.
void for_each_node(torch::jit::Block* block, const std::function<void(torch::jit::Node*)>& visit);

// Users of `value` that compute with its elements, not those that ask for its size, dtype or device only.
std::vector<torch::jit::Use> data_uses(const torch::jit::Value* value);

// The linear maps that `value` is computed from without another linear map or attention in between, nearest first.
std::vector<torch::jit::Node*> nearest_linears(torch::jit::Value* value);

// `value` before all ops that only rearrange it (view, transpose, contiguous, ...) or cast its type.
torch::jit::Value* strip_layout(torch::jit::Value* value);
bool is_layout(const torch::jit::Node* node);

// `value` before all such ops and dropout. They carry the residual stream on.
torch::jit::Value* strip_passive(torch::jit::Value* value);

// Copies the nodes of `body` to before `node`, on `inputs`; returns the copies of its outputs.
std::vector<torch::jit::Value*> insert_graph_before(torch::jit::Node* node, torch::jit::Graph& body,
                                                    at::ArrayRef<torch::jit::Value*> inputs);

// Replaces the outputs of `node` by `values` and destroys `node`.
void replace_node(torch::jit::Node* node, at::ArrayRef<torch::jit::Value*> values);

// The graph of a TorchScript function written in `source`, with all its calls inlined.
std::shared_ptr<torch::jit::Graph> compile_graph(const std::string& source, const std::string& name);

}  // namespace torchgraft
