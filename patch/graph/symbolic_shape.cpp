#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_layout.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

bool is_number_type(const Value* value) {
  const auto kind = value->type()->kind();
  return kind == c10::TypeKind::IntType || kind == c10::TypeKind::FloatType || kind == c10::TypeKind::NumberType;
}

bool keeps_shape(const Node* node) {
  return is_elementwise(node) || node->kind() == c10::prim::unchecked_cast ||
         is_aten(node, {"layer_norm", "native_layer_norm", "rms_norm", "softmax", "log_softmax", "masked_fill",
                        "cumsum", "fill", "copy", "index_fill", "select_scatter", "zeros_like", "ones_like",
                        "full_like", "empty_like"});
}

}  // namespace

Dim Dim::operator*(const Dim& other) const {
  Dim result{factor * other.factor, symbols};
  result.symbols.insert(result.symbols.end(), other.symbols.begin(), other.symbols.end());
  std::sort(result.symbols.begin(), result.symbols.end());
  return result;
}

std::optional<Dim> Dim::divided_by(const Dim& divisor) const {
  if (divisor.factor == 0 || factor % divisor.factor != 0 ||
      !std::includes(symbols.begin(), symbols.end(), divisor.symbols.begin(), divisor.symbols.end())) {
    return std::nullopt;
  }
  Dim result{factor / divisor.factor, {}};
  std::set_difference(symbols.begin(), symbols.end(), divisor.symbols.begin(), divisor.symbols.end(),
                      std::back_inserter(result.symbols));
  return result;
}

std::optional<size_t> position(const Value* dim, size_t rank) {
  auto index = constant_int(dim);
  if (!index) {
    return std::nullopt;
  }
  if (*index < 0) {
    *index += static_cast<int64_t>(rank);
  }
  return *index >= 0 && *index < static_cast<int64_t>(rank) ? std::optional<size_t>(*index) : std::nullopt;
}

Dim product(const Shape& shape) {
  Dim result;
  for (const Dim& dim : shape) {
    result = result * dim;
  }
  return result;
}

Dim SymbolicShapes::fresh() { return Dim{1, {next_symbol_++}}; }

Dim SymbolicShapes::canonical(Dim dim) const {
  bool changed = false;
  for (int& symbol : dim.symbols) {
    for (auto same = same_as_.find(symbol); same != same_as_.end(); same = same_as_.find(symbol)) {
      symbol = same->second;
      changed = true;
    }
  }
  if (changed) {
    std::sort(dim.symbols.begin(), dim.symbols.end());
  }
  return dim;
}

bool SymbolicShapes::assume_equal(const Dim& a, const Dim& b) {
  const Dim left = canonical(a);
  const Dim right = canonical(b);
  const bool single = left.factor == 1 && right.factor == 1 && left.symbols.size() == 1 && right.symbols.size() == 1;
  if (single && left != right) {
    const auto [smaller, larger] = std::minmax(left.symbols[0], right.symbols[0]);
    same_as_[larger] = smaller;
  }
  return single;
}

void SymbolicShapes::assume_equal_products(const Dim& a, const Dim& b) {
  const Dim left = canonical(a);
  const Dim right = canonical(b);
  Dim only_left;
  Dim only_right;
  std::set_difference(left.symbols.begin(), left.symbols.end(), right.symbols.begin(), right.symbols.end(),
                      std::back_inserter(only_left.symbols));
  std::set_difference(right.symbols.begin(), right.symbols.end(), left.symbols.begin(), left.symbols.end(),
                      std::back_inserter(only_right.symbols));
  if (left.factor == right.factor) {
    assume_equal(only_left, only_right);
  }
}

std::optional<Shape> SymbolicShapes::shape(const Value* value) {
  auto known = shapes_.find(value);
  if (known == shapes_.end()) {
    shapes_[value] = std::nullopt;  // a cycle through a loop ends here
    auto result = compute(value);
    known = shapes_.find(value);
    if (result) {  // else keep the shape that a user of the value may have assumed meanwhile
      known->second = std::move(result);
    }
  }
  auto result = known->second;
  for (size_t i = 0; result && i < result->size(); ++i) {
    (*result)[i] = canonical((*result)[i]);
  }
  return result;
}

void SymbolicShapes::assume(const Value* value, const Shape& assumed) {
  if (is_tensor(value) && !shape(value)) {
    shapes_[value] = assumed;
  }
}

std::optional<Shape> SymbolicShapes::compute(const Value* value) {
  if (const at::Tensor tensor = resolve_tensor(value, root_); tensor.defined()) {
    Shape result;
    for (const int64_t size : tensor.sizes()) {
      result.push_back(number(size));
    }
    return result;
  }
  if (value->type()->kind() == c10::TypeKind::ClassType) {
    return of_packed(value);
  }
  const Node* node = value->node();
  if (node->kind() == c10::prim::If) {
    const auto left = shape(node->blocks()[0]->outputs()[value->offset()]);
    const auto right = shape(node->blocks()[1]->outputs()[value->offset()]);
    return left ? left : right;
  }
  if (is_aten(node, {"index_put", "index_copy", "slice_scatter", "scatter"})) {
    return shape_of_written(*this, node);
  }
  if (keeps_shape(node)) {
    return shape(node->input(0));
  }
  if (is_linear(node) || is_aten(node, {"addmm", "matmul", "bmm", "baddbmm"})) {
    return of_projection(node);
  }
  if (is_aten(node, {"embedding", "conv1d", "conv2d", "_convolution", "convolution"})) {
    return of_embedding(node);
  }
  if (is_aten(node, {"scaled_dot_product_attention"})) {
    auto result = shape(node->namedInput("query"));
    const auto values = shape(node->namedInput("value"));
    if (result && values) {
      result->back() = values->back();
    }
    return result;
  }
  if (node->kind() == c10::prim::ListUnpack) {
    return shape_of_piece(*this, node->input()->node(), value->offset());
  }
  if (node->kind() == c10::aten::__getitem__) {
    const auto piece = constant_int(node->input(1));
    return shape_of_piece(*this, node->input(0)->node(), piece.value_or(-1));
  }
  if (is_aten(node, {"add", "sub", "rsub", "mul", "div", "where", "eq", "ne", "lt", "le", "gt", "ge", "__and__",
                     "logical_and", "logical_or", "maximum", "minimum"})) {
    return of_arithmetic(node);
  }
  if (is_aten(node, {"tensor", "scalar_tensor"})) {
    return is_number_type(node->input(0)) ? std::optional<Shape>(Shape{}) : std::nullopt;
  }
  if (is_aten(node, {"arange", "zeros", "ones", "full"})) {
    return of_factory(node);
  }
  return shape_of_layout(*this, node);
}

std::optional<Shape> SymbolicShapes::of_packed(const Value* object) {
  const WeightSource source = weight_source(object, root_);
  const auto weight = source.packed ? packed_weight(source.packed) : std::nullopt;
  return weight ? std::optional(Shape{number(weight->rows), number(weight->columns)}) : std::nullopt;
}

std::optional<Shape> SymbolicShapes::of_projection(const Node* node) {
  const size_t input = is_aten(node, {"addmm", "baddbmm"}) ? 1 : 0;
  auto weight = shape(node->input(input + 1));
  auto result = shape(node->input(input));
  if (!weight && result && result->size() >= 3 && is_aten(node, {"matmul", "bmm"})) {
    weight = assume_factor(*result, node->input(input + 1));
  }
  if (!weight || weight->size() < 2) {
    return std::nullopt;
  }
  const bool transposed = is_linear(node);  // it keeps its weight as [out, in]
  const Dim out = transposed ? (*weight)[0] : weight->back();
  if (!result && is_linear(node)) {
    result = Shape{fresh(), fresh(), weight->back()};
    shapes_[node->input(input)] = result;
  }
  if (result && !transposed && result->size() < weight->size()) {  // one matrix times many
    if (result->size() < 2) {
      return std::nullopt;
    }
    (*weight)[weight->size() - 2] = (*result)[result->size() - 2];
    return weight;
  }
  if (result) {
    const bool are_many = result->size() == weight->size() && result->size() >= 3;
    for (size_t i = 0; are_many && i + 2 < result->size(); ++i) {
      (*result)[i] = (*result)[i] == number(1) ? (*weight)[i] : (*result)[i];
    }
    result->back() = out;
  }
  return result;
}

// The right factor of a product of matrices, of which there are many: as many as of the left one. Rotary positions are
// made so of positions that are an input.
Shape SymbolicShapes::assume_factor(const Shape& left, const Value* right) {
  Shape assumed(left.size());
  std::generate(assumed.begin(), assumed.end(), [&] { return fresh(); });
  assumed[assumed.size() - 2] = left.back();
  shapes_[right] = assumed;
  return assumed;
}

std::optional<Shape> SymbolicShapes::of_embedding(const Node* node) {
  const bool is_embedding = is_aten(node, {"embedding"});
  const auto weight = shape(node->namedInput("weight"));
  if (!weight) {
    return std::nullopt;
  }
  if (!is_embedding) {  // a convolution: its weight is [out, in, sizes...]
    const auto input = shape(node->namedInput("input"));
    Shape result(weight->size());
    std::generate(result.begin(), result.end(), [&] { return fresh(); });
    if (input && input->size() == result.size()) {
      result[0] = input->front();
    }
    result[1] = (*weight)[0];
    return result;
  }
  auto result = shape(node->namedInput("indices"));
  if (!result) {
    result = Shape{fresh(), fresh()};
    shapes_[node->namedInput("indices")] = result;
  }
  result->push_back(weight->back());
  return result;
}

std::optional<Shape> SymbolicShapes::of_arithmetic(const Node* node) {
  std::optional<Shape> result;
  bool all_known = true;
  for (const Value* input : node->inputs()) {
    const auto other = is_tensor(input) ? shape(input) : std::nullopt;
    if (!other) {
      all_known = all_known && !is_tensor(input);
      continue;
    }
    if (!result || other->size() > result->size()) {
      result = other;
    } else if (other->size() == result->size()) {
      for (size_t i = 0; i < result->size(); ++i) {
        if ((*result)[i] == number(1)) {
          (*result)[i] = (*other)[i];
        }
      }
    }
  }
  // When one operand is unknown, another that carries the tokens still gives the shape of the result. A table (ALiBi's
  // slopes) does not: it broadcasts against the unknown one.
  const bool is_table =
      result && std::all_of(result->begin(), result->end(), [](const Dim& d) { return d.is_constant(); });
  return all_known || !is_table ? result : std::nullopt;
}

// arange(end), arange(0, end) and tensors of given sizes.
std::optional<Shape> SymbolicShapes::of_factory(const Node* node) {
  if (!is_aten(node, {"arange"})) {
    return integers(node->namedInput("size"));
  }
  const auto& arguments = node->schema().arguments();
  const bool has_start = arguments[0].name() == "start";
  const bool has_step = arguments.size() > 2 && arguments[2].name() == "step";
  const bool from_zero = !has_start || constant_int(node->namedInput("start")) == 0;
  return !has_step && from_zero ? Shape{integer(node->namedInput("end"))} : Shape{fresh()};
}

std::optional<Shape> SymbolicShapes::integers(const Value* list) {
  if (const auto constant = resolve_constant(list); constant && constant->isIntList()) {
    Shape result;
    for (const int64_t size : constant->toIntVector()) {
      result.push_back(number(size));
    }
    return result;
  }
  if (list->node()->kind() != c10::prim::ListConstruct) {
    return std::nullopt;
  }
  Shape result;
  for (const Value* item : list->node()->inputs()) {
    result.push_back(integer(item));
  }
  return result;
}

Dim SymbolicShapes::integer(const Value* value) {
  if (const auto known = integers_.find(value); known != integers_.end()) {
    return canonical(known->second);
  }
  const Dim result = compute_integer(value);
  integers_.emplace(value, result);
  return canonical(result);
}

Dim SymbolicShapes::compute_integer(const Value* value) {
  if (const auto constant = constant_int(value)) {
    return number(*constant);
  }
  const Node* node = value->node();
  if (node->kind() == c10::prim::NumToTensor ||
      is_aten(node, {"Int", "IntImplicit", "ScalarImplicit", "detach", "to"})) {
    return integer(node->input(0));
  }
  if (is_aten(node, {"size"}) && node->inputs().size() == 2) {
    const auto of = shape(node->namedInput("self"));
    const auto at = of ? position(node->namedInput("dim"), of->size()) : std::nullopt;
    return at ? (*of)[*at] : fresh();
  }
  if (node->kind() == c10::aten::__getitem__ && is_aten(node->input(0)->node(), {"size"})) {
    const auto of = shape(node->input(0)->node()->namedInput("self"));
    const auto at = of ? position(node->input(1), of->size()) : std::nullopt;
    return at ? (*of)[*at] : fresh();
  }
  if (node->kind() == c10::prim::ListUnpack && is_aten(node->input()->node(), {"size"})) {
    const auto of = shape(node->input()->node()->namedInput("self"));
    return of && value->offset() < of->size() ? (*of)[value->offset()] : fresh();
  }
  if (is_aten(node, {"mul"})) {
    return integer(node->input(0)) * integer(node->input(1));
  }
  if (is_aten(node, {"add", "sub"}) && node->inputs().size() >= 2) {
    const Dim left = integer(node->input(0));
    const Dim right = integer(node->input(1));
    if (left.is_constant() && right.is_constant()) {
      return number(is_aten(node, {"add"}) ? left.factor + right.factor : left.factor - right.factor);
    }
    return right == number(0) ? left : fresh();
  }
  if (is_aten(node, {"floordiv", "floor_divide", "div", "__floordiv__"})) {
    const auto quotient = integer(node->input(0)).divided_by(integer(node->input(1)));
    return quotient ? *quotient : fresh();
  }
  return fresh();
}

}  // namespace torchgraft
