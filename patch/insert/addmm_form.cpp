#include <torchgraft/patch/insert/addmm_form.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool is_floating(const at::Tensor& tensor, int64_t rank) {
  return tensor.defined() && tensor.dim() == rank && at::isFloatingType(tensor.scalar_type());
}

bool are_weight_and_bias(Value* weight, Value* bias, const Module& module) {
  const at::Tensor matrix = resolve_tensor(weight, module);
  const at::Tensor row = resolve_tensor(bias, module);
  return is_floating(matrix, 2) && is_floating(row, 1) && row.size(0) == matrix.size(1);
}

std::vector<Node*> nodes_of(Graph& graph, const char* name) {
  std::vector<Node*> result;
  for_each_node(graph.block(), [&](Node* node) {
    if (is_aten(node, {name})) {
      result.push_back(node);
    }
  });
  return result;
}

void write(Graph& graph, Node* linear, const Module& module) {
  Value* x = linear->namedInput("input");
  Value* bias = linear->namedInput("bias");
  const Node* transposed = linear->namedInput("weight")->node();
  if (!is_aten(transposed, {"t"}) || !are_weight_and_bias(transposed->namedInput("self"), bias, module)) {
    return;
  }
  Value* weight = transposed->namedInput("self");
  const at::Tensor matrix = resolve_tensor(weight, module);
  torch::jit::WithInsertPoint guard(linear);
  Value* rows = graph.insert(c10::aten::reshape, {x, std::vector<int64_t>{-1, matrix.size(0)}});
  Value* outer = graph.insert(c10::aten::slice, {graph.insert(c10::aten::size, {x}), c10::IValue(), -1, 1});
  Value* sizes = graph.insert(c10::aten::add, {outer, std::vector<int64_t>{matrix.size(1)}});
  Value* result = graph.insert(c10::aten::view, {graph.insert(c10::aten::addmm, {bias, rows, weight}), sizes});
  result->copyMetadata(linear->output());
  linear->output()->replaceAllUsesWith(result);
  linear->destroy();
}

// A saved graph makes a list of its numbers.
bool is_list(const Value* value, const std::vector<int64_t>& numbers) {
  if (const auto constant = torch::jit::toIValue(value)) {
    return constant->isIntList() && constant->toIntVector() == numbers;
  }
  const auto inputs = value->node()->inputs();
  return value->node()->kind() == c10::prim::ListConstruct &&
         std::equal(inputs.begin(), inputs.end(), numbers.begin(), numbers.end(),
                    [](const Value* input, int64_t number) { return constant_int(input) == number; });
}

// The x of addmm(b, x.reshape(-1, in), w).view(x.size()[:-1] + [out]); null for any other view.
Value* input_of_addmm_form(const Node* view, const Module& module) {
  const Node* addmm = view->namedInput("self")->node();
  const Node* add = view->namedInput("size")->node();
  if (!is_aten(addmm, {"addmm"}) || !is_aten(add, {"add"}) ||
      !are_weight_and_bias(addmm->namedInput("mat2"), addmm->namedInput("self"), module) ||
      constant_double(addmm->namedInput("beta")) != 1.0 || constant_double(addmm->namedInput("alpha")) != 1.0) {
    return nullptr;
  }
  const at::Tensor matrix = resolve_tensor(addmm->namedInput("mat2"), module);
  const Node* rows = addmm->namedInput("mat1")->node();
  const Node* outer = add->input(0)->node();
  if (!is_aten(rows, {"reshape"}) || !is_list(rows->namedInput("shape"), {-1, matrix.size(0)}) ||
      !is_list(add->input(1), {matrix.size(1)}) || !is_aten(outer, {"slice"}) || outer->inputs().size() != 4 ||
      !is_none(outer->input(1)) || constant_int(outer->input(2)) != -1 || constant_int(outer->input(3)) != 1) {
    return nullptr;
  }
  Value* x = rows->namedInput("self");
  const Node* sizes = outer->input(0)->node();
  return is_aten(sizes, {"size"}) && sizes->inputs().size() == 1 && sizes->input(0) == x ? x : nullptr;
}

void read(Graph& graph, Node* view, const Module& module) {
  Value* x = input_of_addmm_form(view, module);
  if (!x) {
    return;
  }
  const Node* addmm = view->namedInput("self")->node();
  torch::jit::WithInsertPoint guard(view);
  Value* weight = graph.insert(c10::aten::t, {addmm->namedInput("mat2")});
  Value* linear = graph.insert(c10::aten::linear, {x, weight, addmm->namedInput("self")});
  linear->copyMetadata(view->output());
  view->output()->replaceAllUsesWith(linear);
  view->destroy();
}

}  // namespace

void write_addmm_form(const std::shared_ptr<Graph>& graph, const Module& module) {
  for (Node* linear : nodes_of(*graph, "linear")) {
    write(*graph, linear, module);
  }
  torch::jit::EliminateDeadCode(graph);
}

void read_addmm_form(const std::shared_ptr<Graph>& graph, const Module& module) {
  for (Node* view : nodes_of(*graph, "view")) {
    read(*graph, view, module);
  }
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
