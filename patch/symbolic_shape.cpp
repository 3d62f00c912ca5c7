#include <torchgraft/patch/symbolic_shape.h>

#include <torchgraft/patch/graph_utils.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

Dim number(int64_t factor) { return Dim{factor, {}}; }

// `dim` counted from the front; nullopt when it is no constant or out of range.
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

bool keeps_shape(const Node* node) {
  return is_aten(node, {"layer_norm",
                        "rms_norm",
                        "dropout",
                        "relu",
                        "gelu",
                        "silu",
                        "tanh",
                        "sigmoid",
                        "to",
                        "type_as",
                        "contiguous",
                        "clone",
                        "detach",
                        "softmax",
                        "masked_fill",
                        "alias",
                        "leaky_relu",
                        "mish",
                        "relu6",
                        "hardswish",
                        "elu",
                        "neg",
                        "exp",
                        "rsqrt",
                        "pow",
                        "feature_dropout",
                        "native_layer_norm"}) ||
         node->kind() == c10::prim::unchecked_cast;
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

Dim SymbolicShapes::fresh() { return Dim{1, {next_symbol_++}}; }

std::optional<Shape> SymbolicShapes::shape(const Value* value) {
  if (const auto known = shapes_.find(value); known != shapes_.end()) {
    return known->second;
  }
  shapes_[value] = std::nullopt;  // a cycle through a loop ends here
  auto result = compute(value);
  if (!result && shapes_[value]) {
    return shapes_[value];  // a user of the value has assumed its shape meanwhile
  }
  shapes_[value] = result;
  return result;
}

std::optional<Shape> SymbolicShapes::compute(const Value* value) {
  if (const at::Tensor tensor = resolve_tensor(value, root_); tensor.defined()) {
    Shape result;
    for (const int64_t size : tensor.sizes()) {
      result.push_back(number(size));
    }
    return result;
  }
  const Node* node = value->node();
  if (node->kind() == c10::prim::If) {
    const auto left = shape(node->blocks()[0]->outputs()[value->offset()]);
    const auto right = shape(node->blocks()[1]->outputs()[value->offset()]);
    return left ? left : right;
  }
  if (keeps_shape(node)) {
    return shape(node->input(0));
  }
  if (is_aten(node, {"linear", "addmm", "matmul", "bmm"})) {
    return of_projection(node);
  }
  if (is_aten(node, {"embedding", "conv2d", "_convolution", "convolution"})) {
    return of_embedding(node);
  }
  if (is_aten(node, {"scaled_dot_product_attention"})) {
    auto result = shape(node->input(0));
    const auto values = shape(node->input(2));
    if (result && values) {
      result->back() = values->back();
    }
    return result;
  }
  if (node->kind() == c10::prim::ListUnpack) {
    return of_split(node->input()->node());
  }
  if (node->kind() == c10::aten::__getitem__) {
    return of_split(node->input(0)->node());
  }
  if (is_aten(node, {"add", "sub", "mul", "div", "where"})) {
    return of_arithmetic(node);
  }
  return of_layout(node, value->offset());
}

std::optional<Shape> SymbolicShapes::of_projection(const Node* node) {
  const size_t input = is_aten(node, {"addmm"}) ? 1 : 0;
  const auto weight = shape(node->input(input + 1));
  auto result = shape(node->input(input));
  if (!weight || weight->size() < 2) {
    return std::nullopt;
  }
  const bool transposed = is_aten(node, {"linear"});  // linear keeps its weight as [out, in]
  const Dim out = transposed ? (*weight)[0] : weight->back();
  if (!result && is_aten(node, {"linear"})) {
    result = Shape{fresh(), fresh(), weight->back()};
    shapes_[node->input(input)] = result;
  }
  if (result) {
    result->back() = out;
  }
  return result;
}

std::optional<Shape> SymbolicShapes::of_embedding(const Node* node) {
  const bool is_embedding = is_aten(node, {"embedding"});
  const auto weight = shape(node->input(is_embedding ? 0 : 1));
  if (!weight) {
    return std::nullopt;
  }
  if (!is_embedding) {
    return weight->size() == 4 ? std::optional<Shape>(Shape{fresh(), (*weight)[0], fresh(), fresh()}) : std::nullopt;
  }
  auto result = shape(node->input(1));
  if (!result) {
    result = Shape{fresh(), fresh()};
    shapes_[node->input(1)] = result;
  }
  result->push_back(weight->back());
  return result;
}

std::optional<Shape> SymbolicShapes::of_arithmetic(const Node* node) {
  std::optional<Shape> result;
  for (const Value* input : node->inputs()) {
    const auto other = input->type()->isSubtypeOf(*c10::TensorType::get()) ? shape(input) : std::nullopt;
    if (!other) {
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
  return result;
}

// What one piece of a chunk, split or unbind looks like.
std::optional<Shape> SymbolicShapes::of_split(const Node* node) {
  const bool chunks = is_aten(node, {"chunk", "tensor_split"});
  const bool unbinds = is_aten(node, {"unbind"});
  if (!chunks && !unbinds && !is_aten(node, {"split", "split_with_sizes"})) {
    return std::nullopt;
  }
  auto result = shape(node->input(0));
  const size_t dim_input = unbinds ? 1 : 2;
  const auto dim = result ? position(node->input(dim_input), result->size()) : std::nullopt;
  if (!dim) {
    return std::nullopt;
  }
  if (unbinds) {
    result->erase(result->begin() + *dim);
    return result;
  }
  const auto count = constant_int(node->input(1));
  if (chunks && count) {
    const auto piece = (*result)[*dim].divided_by(number(*count));
    (*result)[*dim] = piece ? *piece : fresh();
  } else {
    (*result)[*dim] = count ? number(*count) : fresh();
  }
  return result;
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

std::optional<Shape> SymbolicShapes::reshaped(const Shape& from, const Value* sizes) {
  auto result = integers(sizes);
  if (!result) {
    return std::nullopt;
  }
  Dim known;
  Dim* inferred = nullptr;
  for (Dim& dim : *result) {
    if (dim == number(-1)) {
      inferred = &dim;
    } else {
      known = known * dim;
    }
  }
  if (inferred) {
    const auto rest = product(from).divided_by(known);
    *inferred = rest ? *rest : fresh();
  }
  return result;
}

std::optional<Shape> SymbolicShapes::of_layout(const Node* node, size_t) {
  if (node->inputs().empty() || !node->input(0)->type()->isSubtypeOf(*c10::TensorType::get())) {
    return std::nullopt;
  }
  auto result = shape(node->input(0));
  if (!result) {
    // A view of something unknown still says what comes out, unless a size is to be inferred.
    const auto sizes = is_aten(node, {"view", "reshape"}) ? integers(node->input(1)) : std::nullopt;
    const bool complete = sizes && std::find(sizes->begin(), sizes->end(), number(-1)) == sizes->end();
    return complete ? sizes : std::nullopt;
  }
  const size_t rank = result->size();
  if (is_aten(node, {"view", "reshape", "_unsafe_view"})) {
    return reshaped(*result, node->input(1));
  }
  if (is_aten(node, {"expand"})) {
    auto sizes = integers(node->input(1));
    for (size_t i = 0; sizes && i < sizes->size() && sizes->size() == rank; ++i) {
      if ((*sizes)[i] == number(-1)) {
        (*sizes)[i] = (*result)[i];
      }
    }
    return sizes;
  }
  if (is_aten(node, {"transpose", "swapaxes"})) {
    const auto a = position(node->input(1), rank);
    const auto b = position(node->input(2), rank);
    if (a && b) {
      std::swap((*result)[*a], (*result)[*b]);
      return result;
    }
  }
  if (is_aten(node, {"t", "numpy_T"}) && rank == 2) {
    std::swap((*result)[0], (*result)[1]);
    return result;
  }
  if (is_aten(node, {"permute"})) {
    const auto order = integers(node->input(1));
    Shape permuted;
    for (size_t i = 0; order && i < order->size(); ++i) {
      const int64_t from =
          (*order)[i].factor < 0 ? (*order)[i].factor + static_cast<int64_t>(rank) : (*order)[i].factor;
      if (from >= 0 && from < static_cast<int64_t>(rank)) {
        permuted.push_back((*result)[from]);
      }
    }
    return permuted.size() == rank ? std::optional<Shape>(permuted) : std::nullopt;
  }
  if (is_aten(node, {"unsqueeze"})) {
    const auto at = position(node->input(1), rank + 1);
    if (at) {
      result->insert(result->begin() + *at, number(1));
      return result;
    }
  }
  if (is_aten(node, {"squeeze", "select"}) && node->inputs().size() >= 2) {
    const auto at = position(node->input(1), rank);
    if (at && (is_aten(node, {"select"}) || (*result)[*at] == number(1))) {
      result->erase(result->begin() + *at);
      return result;
    }
  }
  if (is_aten(node, {"slice", "narrow"})) {
    const auto at = position(node->input(1), rank);
    if (at) {
      const auto start = constant_int(node->input(2));
      const auto end = is_aten(node, {"slice"}) ? constant_int(node->input(3)) : std::nullopt;
      const bool whole = start == 0 && end && *end == std::numeric_limits<int64_t>::max();
      if (!whole) {
        const bool inside = start && end && *start >= 0 && *end >= *start && (*result)[*at].is_constant() &&
                            *end <= (*result)[*at].factor;
        (*result)[*at] = inside ? number(*end - *start) : fresh();
      }
      return result;
    }
  }
  if (is_aten(node, {"flatten"})) {
    const auto start = position(node->input(1), rank);
    const auto end = position(node->input(2), rank);
    if (start && end && *start <= *end) {
      Shape flat(result->begin(), result->begin() + *start);
      flat.push_back(product(Shape(result->begin() + *start, result->begin() + *end + 1)));
      flat.insert(flat.end(), result->begin() + *end + 1, result->end());
      return flat;
    }
  }
  if (is_aten(node, {"unflatten"})) {
    const auto at = position(node->input(1), rank);
    const auto sizes = at ? reshaped({(*result)[*at]}, node->input(2)) : std::nullopt;
    if (sizes) {
      result->erase(result->begin() + *at);
      result->insert(result->begin() + *at, sizes->begin(), sizes->end());
      return result;
    }
  }
  return std::nullopt;
}

Dim SymbolicShapes::integer(const Value* value) {
  if (const auto known = integers_.find(value); known != integers_.end()) {
    return known->second;
  }
  const Dim result = compute_integer(value);
  integers_.emplace(value, result);
  return result;
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
    const auto of = shape(node->input(0));
    const auto at = of ? position(node->input(1), of->size()) : std::nullopt;
    return at ? (*of)[*at] : fresh();
  }
  if (node->kind() == c10::aten::__getitem__ && is_aten(node->input(0)->node(), {"size"})) {
    const auto of = shape(node->input(0)->node()->input(0));
    const auto at = of ? position(node->input(1), of->size()) : std::nullopt;
    return at ? (*of)[*at] : fresh();
  }
  if (node->kind() == c10::prim::ListUnpack && is_aten(node->input()->node(), {"size"})) {
    const auto of = shape(node->input()->node()->input(0));
    return of && value->offset() < of->size() ? (*of)[value->offset()] : fresh();
  }
  if (is_aten(node, {"mul"})) {
    return integer(node->input(0)) * integer(node->input(1));
  }
  if (is_aten(node, {"floordiv", "floor_divide", "div", "__floordiv__"})) {
    const auto quotient = integer(node->input(0)).divided_by(integer(node->input(1)));
    return quotient ? *quotient : fresh();
  }
  return fresh();
}

}  // namespace torchgraft
