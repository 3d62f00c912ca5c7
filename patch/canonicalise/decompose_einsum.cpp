#include <torchgraft/patch/canonicalise/decompose_einsum.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>

#include <algorithm>
#include <cctype>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool contains(const std::string& letters, char letter) { return letters.find(letter) != std::string::npos; }

// The letters of `from`, in its order, that are in `a` if in_a says so, else not; likewise for `b`.
std::string letters_of(const std::string& from, const std::string& a, bool in_a, const std::string& b, bool in_b) {
  std::string result;
  std::copy_if(from.begin(), from.end(), std::back_inserter(result),
               [&](char letter) { return contains(a, letter) == in_a && contains(b, letter) == in_b; });
  return result;
}

// "ab,bc->ac": the letters of the operands and of the result.
struct Equation {
  std::string left;
  std::string right;
  std::string result;
};

bool is_plain(const std::string& letters) {
  for (size_t i = 0; i < letters.size(); ++i) {
    if (!std::isalpha(static_cast<unsigned char>(letters[i])) || letters.find(letters[i], i + 1) != std::string::npos) {
      return false;
    }
  }
  return true;
}

// Without an arrow the result has the letters that occur once, in alphabetical order.
std::string implied_result(const Equation& equation) {
  std::string letters = letters_of(equation.left, equation.right, false, "", false) +
                        letters_of(equation.right, equation.left, false, "", false);
  std::sort(letters.begin(), letters.end());
  return letters;
}

std::optional<Equation> parse(std::string text) {
  text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
  const size_t comma = text.find(',');
  if (comma == std::string::npos) {
    return std::nullopt;
  }
  const size_t arrow = text.find("->");
  Equation result;
  result.left = text.substr(0, comma);
  result.right = text.substr(comma + 1, arrow == std::string::npos ? arrow : arrow - comma - 1);
  result.result = arrow == std::string::npos ? implied_result(result) : text.substr(arrow + 2);
  if (!is_plain(result.left) || !is_plain(result.right) || !is_plain(result.result)) {
    return std::nullopt;
  }
  const bool sums_alone = !letters_of(result.left, result.right, false, result.result, false).empty() ||
                          !letters_of(result.right, result.left, false, result.result, false).empty();
  return sums_alone ? std::nullopt : std::optional<Equation>(result);
}

class EinsumDecomposer {
 public:
  EinsumDecomposer(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module)
      : graph_(graph), module_(module) {}

  void decompose(Node* node);

 private:
  Value* linear(const Equation& equation, Value* input, Value* weight);
  Value* product(Equation equation, Value* left, Value* right);
  Value* weight_matrix(Value* weight, const std::string& letters, const std::string& out, const std::string& in);
  Value* permuted(Value* value, const std::string& from, const std::string& to);
  Value* flattened(Value* value, int64_t start, int64_t end);

  std::shared_ptr<Graph> graph_;
  const torch::jit::Module& module_;
};

// Permutes `value`, whose dimensions are the letters `from`, to the order `to`.
Value* EinsumDecomposer::permuted(Value* value, const std::string& from, const std::string& to) {
  if (from == to) {
    return value;
  }
  std::vector<int64_t> order;
  for (const char letter : to) {
    order.push_back(static_cast<int64_t>(from.find(letter)));
  }
  return graph_->insert(c10::aten::permute, {value, graph_->insertConstant(order)});
}

Value* EinsumDecomposer::flattened(Value* value, int64_t start, int64_t end) {
  return start == end ? value : graph_->insert(c10::aten::flatten, {value, start, end});
}

// Inserts a parameter with the dimensions `letters` as a matrix [out, in].
Value* EinsumDecomposer::weight_matrix(Value* weight, const std::string& letters, const std::string& out,
                                       const std::string& in) {
  if (letters.size() == 2) {
    return letters == out + in ? weight : graph_->insert(c10::aten::t, {weight});
  }
  const auto outs = static_cast<int64_t>(out.size());
  const auto ins = static_cast<int64_t>(in.size());
  Value* matrix = flattened(permuted(weight, letters, out + in), outs, outs + ins - 1);
  return flattened(matrix, 0, outs - 1);
}

// Inserts the einsum as a linear map of `input`, the equation's left side. Null when it is none.
Value* EinsumDecomposer::linear(const Equation& equation, Value* input, Value* weight) {
  const std::string rows = letters_of(equation.left, equation.right, false, equation.result, true);
  const std::string in = letters_of(equation.left, equation.right, true, equation.result, false);
  const std::string out = letters_of(equation.result, equation.right, true, equation.left, false);
  const at::Tensor tensor = weight_source(weight, module_).tensor;
  const auto shape = SymbolicShapes(module_).shape(weight);  // not a member: it would keep shapes of destroyed nodes
  const bool is_map = !rows.empty() && !in.empty() && !out.empty() && rows.size() + in.size() == equation.left.size();
  const bool is_parameter = tensor.defined() && at::isFloatingType(tensor.scalar_type());
  const bool sizes_known = shape && shape->size() == equation.right.size() &&
                           std::all_of(shape->begin(), shape->end(), [](const Dim& dim) { return dim.is_constant(); });
  if (!is_map || !is_parameter || !sizes_known) {
    return nullptr;
  }
  Value* x = flattened(permuted(input, equation.left, rows + in), -static_cast<int64_t>(in.size()), -1);
  Value* matrix = weight_matrix(weight, equation.right, out, in);
  Value* y = graph_->insert(c10::aten::linear, {x, matrix, graph_->insertConstant(c10::IValue())});
  if (out.size() > 1) {
    std::vector<int64_t> sizes;
    for (const char letter : out) {
      sizes.push_back(shape->at(equation.right.find(letter)).factor);
    }
    y = graph_->insert(c10::Symbol::aten("unflatten"), {y, -1, graph_->insertConstant(sizes)});
  }
  return permuted(y, rows + out, equation.result);
}

bool comes_from_softmax(Value* value) { return is_aten(strip_passive(value)->node(), {"softmax", "_softmax"}); }

// Inserts the einsum as [batch..., row, inner] times [batch..., inner, column]. Null unless row, inner and column are
// one letter each.
Value* EinsumDecomposer::product(Equation equation, Value* left, Value* right) {
  const auto row_of = [](const Equation& e) { return letters_of(e.left, e.right, false, e.result, true); };
  const auto column_of = [](const Equation& e) { return letters_of(e.right, e.left, false, e.result, true); };
  const std::string inner = letters_of(equation.left, equation.right, true, equation.result, false);
  if (row_of(equation).size() != 1 || column_of(equation).size() != 1 || inner.size() != 1) {
    return nullptr;
  }
  // Attention probabilities are the left factor; else the operand whose letter comes first in the result is.
  const bool columns_first = equation.result.find(column_of(equation)) < equation.result.find(row_of(equation));
  if (comes_from_softmax(right) || (columns_first && !comes_from_softmax(left))) {
    std::swap(equation.left, equation.right);
    std::swap(left, right);
  }
  const std::string row = row_of(equation);
  const std::string column = column_of(equation);
  const std::string batch = letters_of(equation.result, equation.left, true, equation.right, true);
  left = permuted(left, equation.left, batch + row + inner);
  // Keeps the operand's own order of letters, so that keys and values are both [..., tokens, d].
  if (equation.right.find(column) < equation.right.find(inner)) {
    right = permuted(right, equation.right, batch + column + inner);
    right = graph_->insert(c10::aten::transpose, {right, -1, -2});
  } else {
    right = permuted(right, equation.right, batch + inner + column);
  }
  return permuted(graph_->insert(c10::aten::matmul, {left, right}), batch + row + column, equation.result);
}

void EinsumDecomposer::decompose(Node* node) {
  const auto text = resolve_constant(node->namedInput("equation"));
  Node* list = node->namedInput("tensors")->node();
  if (!text || !text->isString() || list->kind() != c10::prim::ListConstruct || list->inputs().size() != 2) {
    return;
  }
  const auto equation = parse(text->toStringRef());
  if (!equation) {
    return;
  }
  torch::jit::WithInsertPoint guard(node);
  const Equation swapped{equation->right, equation->left, equation->result};
  Value* result = linear(*equation, list->input(0), list->input(1));
  result = result ? result : linear(swapped, list->input(1), list->input(0));
  result = result ? result : product(*equation, list->input(0), list->input(1));
  if (result) {
    replace_node(node, {result});
  }
}

}  // namespace

void decompose_einsum(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module) {
  EinsumDecomposer decomposer(graph, module);
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"einsum"})) {
      decomposer.decompose(node);
    }
  });
}

}  // namespace torchgraft
