#include <torchgraft/patch/insert/addmm_form.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool is_floating(const at::Tensor& tensor, int64_t rank) {
  return tensor.defined() && tensor.dim() == rank && at::isFloatingType(tensor.scalar_type());
}

bool has_weight_and_bias(Value* weight, Value* bias, const Module& module) {
  const at::Tensor matrix = resolve_tensor(weight, module);
  return is_floating(matrix, 2) && (is_none(bias) || (is_floating(resolve_tensor(bias, module), 1) &&
                                                      resolve_tensor(bias, module).size(0) == matrix.size(1)));
}

std::vector<Node*> nodes_of(Block* block, const char* name) {
  std::vector<Node*> result;
  for (Node* node : block->nodes()) {
    if (is_aten(node, {name})) {
      result.push_back(node);
    }
    for (Block* inner : node->blocks()) {
      const std::vector<Node*> found = nodes_of(inner, name);
      result.insert(result.end(), found.begin(), found.end());
    }
  }
  return result;
}

void write(Graph& graph, Node* linear, const Module& module) {
  Value* x = linear->namedInput("input");
  Value* bias = linear->namedInput("bias");
  const Node* transposed = linear->namedInput("weight")->node();
  if (!is_aten(transposed, {"t"}) || !has_weight_and_bias(transposed->namedInput("self"), bias, module)) {
    return;
  }
  Value* weight = transposed->namedInput("self");
  torch::jit::WithInsertPoint guard(linear);
  Value* result = nullptr;
  if (is_none(bias)) {
    result = graph.insert(c10::aten::matmul, {x, weight});
  } else {
    const at::Tensor matrix = resolve_tensor(weight, module);
    Value* rows = graph.insert(c10::aten::reshape, {x, std::vector<int64_t>{-1, matrix.size(0)}});
    Value* sizes = graph.insert(c10::aten::size, {x});
    Value* outer = graph.insert(c10::aten::slice, {sizes, c10::IValue(), -1, 1});
    Value* all = graph.insert(c10::aten::add, {outer, std::vector<int64_t>{matrix.size(1)}});
    result = graph.insert(c10::aten::view, {graph.insert(c10::aten::addmm, {bias, rows, weight}), all});
  }
  result->copyMetadata(linear->output());
  linear->output()->replaceAllUsesWith(result);
  linear->destroy();
}

// The x of view(addmm(b, reshape(x, ...), w), size(x)[:-1] + [out]); null for any other view.
Value* input_of_addmm_form(const Node* view) {
  const Node* addmm = view->namedInput("self")->node();
  const Node* add = view->namedInput("size")->node();
  if (!is_aten(addmm, {"addmm"}) || !is_aten(add, {"add"}) || constant_double(addmm->namedInput("beta")) != 1.0 ||
      constant_double(addmm->namedInput("alpha")) != 1.0) {
    return nullptr;
  }
  const Node* rows = addmm->namedInput("mat1")->node();
  const Node* slice = add->input(0)->node();
  if (!is_aten(rows, {"reshape"}) || !is_aten(slice, {"slice"}) || slice->inputs().size() != 4 ||
      constant_int(slice->input(2)) != -1 || !is_aten(slice->input(0)->node(), {"size"})) {
    return nullptr;
  }
  Value* x = rows->namedInput("self");
  const Node* sizes = slice->input(0)->node();
  return sizes->inputs().size() == 1 && sizes->input(0) == x ? x : nullptr;
}

void read(Graph& graph, Node* view, const Module& module) {
  Value* x = input_of_addmm_form(view);
  if (!x) {
    return;
  }
  const Node* addmm = view->namedInput("self")->node();
  Value* weight = addmm->namedInput("mat2");
  Value* bias = addmm->namedInput("self");
  if (is_none(bias) || !has_weight_and_bias(weight, bias, module)) {
    return;
  }
  torch::jit::WithInsertPoint guard(view);
  Value* linear = graph.insert(c10::aten::linear, {x, graph.insert(c10::aten::t, {weight}), bias});
  linear->copyMetadata(view->output());
  view->output()->replaceAllUsesWith(linear);
  view->destroy();
}

}  // namespace

void write_addmm_form(const std::shared_ptr<Graph>& graph, const Module& module) {
  for (Node* linear : nodes_of(graph->block(), "linear")) {
    write(*graph, linear, module);
  }
  torch::jit::EliminateDeadCode(graph);
}

void read_addmm_form(const std::shared_ptr<Graph>& graph, const Module& module) {
  for (Node* view : nodes_of(graph->block(), "view")) {
    read(*graph, view, module);
  }
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
