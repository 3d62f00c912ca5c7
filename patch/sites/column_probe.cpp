#include <torchgraft/patch/sites/column_probe.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

// Ops that move elements about without computing: the probe executes them.
bool moves_elements(const Node* node) {
  return is_aten(node, {"view",         "reshape",  "_unsafe_view", "flatten", "unflatten",
                        "transpose",    "swapaxes", "permute",      "movedim", "unsqueeze",
                        "squeeze",      "chunk",    "split",        "unbind",  "split_with_sizes",
                        "tensor_split", "select",   "slice",        "narrow",  "cat",
                        "concat",       "stack",    "expand",       "repeat",  "repeat_interleave",
                        "flip",         "t",        "contiguous",   "index"});
}

class Probe {
 public:
  Probe(Node* linear, SymbolicShapes& shapes) : linear_(linear), shapes_(shapes) {}

  at::Tensor tensor(Value* value);

 private:
  c10::IValue evaluate(Value* value);
  c10::IValue run(Node* node, size_t output);
  bool splits_unknown_size(const Node* node);
  bool leads_to_linear(Value* value);
  Value* tokens_of_linear(Node* node);
  at::Tensor fitted(at::Tensor columns, Node* node);
  at::Tensor first_token(at::Tensor columns, Value* value);
  c10::IValue of_branch(Node* branch, size_t output);
  std::vector<int64_t> concrete(const Shape& shape);
  int64_t concrete(const Dim& dim);

  Node* linear_;
  SymbolicShapes& shapes_;
  std::map<int, int64_t> sizes_;  // by symbol
  std::map<Value*, c10::IValue> known_;
};

int64_t Probe::concrete(const Dim& dim) {
  int64_t result = dim.factor;
  for (const int symbol : dim.symbols) {
    // Symbols get small sizes from 2 on: a size of 1 would broadcast.
    result *= sizes_.try_emplace(symbol, static_cast<int64_t>(sizes_.size()) + 2).first->second;
  }
  return result;
}

std::vector<int64_t> Probe::concrete(const Shape& shape) {
  std::vector<int64_t> result;
  for (const Dim& dim : shape) {
    result.push_back(concrete(dim));
  }
  return result;
}

at::Tensor Probe::tensor(Value* value) {
  const c10::IValue result = evaluate(value);
  return result.isTensor() ? result.toTensor() : at::Tensor();
}

// Whether `node` splits a dimension of unknown size, such as the tokens into those with and without rotary positions.
// The guessed sizes need not add up, but all pieces hold the same columns.
bool Probe::splits_unknown_size(const Node* node) {
  if (!is_aten(node, {"split_with_sizes", "split"}) || node->input(1)->node()->kind() != c10::prim::ListConstruct) {
    return false;
  }
  const auto shape = shapes_.shape(node->namedInput("self"));
  const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
  return dim && !(*shape)[*dim].is_constant();
}

bool Probe::leads_to_linear(Value* value) {
  const auto linears = is_tensor(value) ? nearest_linears(value) : std::vector<Node*>();
  return std::find(linears.begin(), linears.end(), linear_) != linears.end();
}

// Where `node` joins or writes tokens, such as this pass's to those of a cache: an operand that comes from the linear
// map. All tokens hold the same columns. Null for other nodes.
Value* Probe::tokens_of_linear(Node* node) {
  const bool joins = is_aten(node, {"cat", "concat"}) && node->input(0)->node()->kind() == c10::prim::ListConstruct;
  if (!joins && !is_aten(node, {"index_copy", "index_put", "scatter", "slice_scatter"})) {
    return nullptr;
  }
  const auto shape = shapes_.shape(node->output());
  const auto dim = shape && joins ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
  if (!shape || (joins && (!dim || (*shape)[*dim].is_constant()))) {
    return nullptr;
  }
  const auto operands = joins ? node->input(0)->node()->inputs() : node->inputs();
  const auto found =
      std::find_if(operands.begin(), operands.end(), [&](Value* operand) { return leads_to_linear(operand); });
  return found == operands.end() ? nullptr : *found;
}

// The dimension along which `node` writes; nullopt where it says none. A program of fixed sizes has as many tokens in a
// cache as it has, and fewer in a pass.
std::optional<size_t> written_dimension(const Node* node, size_t rank) {
  const bool says = is_aten(node, {"index_copy", "scatter", "slice_scatter"});
  return says ? position(node->namedInput("dim"), rank) : std::nullopt;
}

// `columns` in the shape of what `node` makes: one of the tokens that it holds stands for all.
at::Tensor Probe::fitted(at::Tensor columns, Node* node) {
  const Shape shape = *shapes_.shape(node->output());
  const auto sizes = concrete(shape);
  const auto written = written_dimension(node, sizes.size());
  for (size_t i = 0; i < sizes.size() && columns.dim() == static_cast<int64_t>(sizes.size()); ++i) {
    const auto dim = static_cast<int64_t>(i);
    const bool is_open = !shape[i].is_constant() || written == i;
    const bool differs = is_open && columns.size(dim) != sizes[i] && columns.size(dim) > 0;
    columns = differs ? columns.narrow(dim, 0, 1) : columns;
  }
  return columns.expand(sizes);
}

// `columns`, which `value` holds, without all but the first in dimensions of unknown size.
at::Tensor Probe::first_token(at::Tensor columns, Value* value) {
  const auto shape = shapes_.shape(value);
  for (int64_t dim = 0; shape && dim < columns.dim() && columns.dim() == static_cast<int64_t>(shape->size()); ++dim) {
    columns = (*shape)[dim].is_constant() ? columns : columns.narrow(dim, 0, 1);
  }
  return columns;
}

// Both sides must hold the same columns, but one may have nothing of the linear map.
c10::IValue Probe::of_branch(Node* branch, size_t output) {
  Value* values[] = {branch->blocks()[0]->outputs()[output], branch->blocks()[1]->outputs()[output]};
  const bool by_second = leads_to_linear(values[1]);
  if (!by_second || !leads_to_linear(values[0])) {
    return evaluate(values[by_second ? 1 : 0]);
  }
  const at::Tensor left = tensor(values[0]);
  const at::Tensor right = tensor(values[1]);
  const bool agree =
      left.defined() && right.defined() && at::equal(first_token(left, values[0]), first_token(right, values[1]));
  return agree ? c10::IValue(left) : c10::IValue();
}

// Returns None for a value that cannot be known.
c10::IValue Probe::evaluate(Value* value) {
  if (const auto known = known_.find(value); known != known_.end()) {
    return known->second;
  }
  c10::IValue result;
  Node* node = value->node();
  if (value == linear_->output()) {
    if (const auto shape = shapes_.shape(value)) {
      const auto sizes = concrete(*shape);
      result = at::arange(sizes.back()).expand(sizes).contiguous();
    }
  } else if (const auto constant = resolve_constant(value)) {
    result = *constant;
  } else if (value->type()->kind() == c10::TypeKind::IntType) {
    result = concrete(shapes_.integer(value));
  } else {
    result = run(node, value->offset());
  }
  known_[value] = result;
  return result;
}

c10::IValue Probe::run(Node* node, size_t output) {
  if (node->kind() == c10::prim::If) {
    return of_branch(node, output);
  }
  if (node->kind() == c10::prim::ListConstruct) {
    const bool of_ints = node->output()->type()->expectRef<c10::ListType>().getElementType() == c10::IntType::get();
    std::vector<int64_t> integers;
    std::vector<at::Tensor> tensors;
    for (Value* item : node->inputs()) {
      if (of_ints) {
        integers.push_back(concrete(shapes_.integer(item)));
      } else if (tensors.push_back(tensor(item)); !tensors.back().defined()) {
        return {};
      }
    }
    return of_ints ? c10::IValue(integers) : c10::IValue(tensors);
  }
  if (node->kind() == c10::prim::ListUnpack || node->kind() == c10::aten::__getitem__) {
    const c10::IValue list = evaluate(node->input(0));
    int64_t index = static_cast<int64_t>(output);
    if (node->kind() == c10::aten::__getitem__) {
      index = constant_int(node->input(1)).value_or(-1);
    }
    const bool inside = list.isTensorList() && index >= 0 && index < static_cast<int64_t>(list.toTensorList().size());
    return inside ? c10::IValue(list.toTensorList().get(index)) : c10::IValue();
  }
  if (splits_unknown_size(node)) {
    const at::Tensor whole = tensor(node->namedInput("self"));
    const auto pieces = static_cast<int64_t>(node->input(1)->node()->inputs().size());
    return whole.defined() ? c10::IValue(whole.tensor_split(pieces, *constant_int(node->namedInput("dim"))))
                           : c10::IValue();
  }
  if (Value* tokens = tokens_of_linear(node)) {
    const at::Tensor columns = tensor(tokens);
    return columns.defined() ? c10::IValue(fitted(columns, node)) : c10::IValue();
  }
  if (moves_elements(node)) {
    torch::jit::Stack stack;
    for (Value* input : node->inputs()) {
      stack.push_back(evaluate(input));
      if (stack.back().isNone() && !is_none(input)) {
        return {};
      }
    }
    node->getOperation()(stack);
    return stack.empty() ? c10::IValue() : stack.front();
  }
  for (Value* input : node->inputs()) {
    if (leads_to_linear(input)) {
      return evaluate(input);
    }
  }
  return {};
}

}  // namespace

std::optional<std::vector<int64_t>> columns_reaching(Value* heads, Node* linear, SymbolicShapes& shapes) {
  at::Tensor arrived;
  try {
    arrived = Probe(linear, shapes).tensor(heads);
  } catch (const c10::Error&) {  // a guessed size does not fit: nothing is known
    return std::nullopt;
  }
  if (!arrived.defined() || arrived.dim() != 4) {
    return std::nullopt;
  }
  const at::Tensor columns = arrived.select(2, 0).select(0, 0).reshape(-1).to(at::kLong).contiguous();
  return std::vector<int64_t>(columns.data_ptr<int64_t>(), columns.data_ptr<int64_t>() + columns.numel());
}

}  // namespace torchgraft
