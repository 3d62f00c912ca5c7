#include <torchgraft/patch/canonicalise/head_order.h>

#include <torchgraft/patch/graph/exchanged_dims.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

// A dimension of a value.
struct Place {
  Value* value = nullptr;
  size_t dim = 0;
};

// A part of a view's dimension: a dimension of the viewed value, or a piece of one.
struct Part {
  Dim size;
  size_t from = 0;
  bool is_whole = false;
};

// What the dimensions `dim` of a view consists of, outermost first; empty when the sizes do not show it. Both shapes
// count the same elements in row-major order.
std::vector<Part> parts_of(const Shape& from, const Shape& to, size_t dim) {
  size_t source = 0;
  Dim rest = from.empty() ? number(1) : from.front();  // of dimension `source`
  for (size_t target = 0; target <= dim; ++target) {
    std::vector<Part> parts;
    Dim wanted = to[target];
    while (wanted != number(1)) {
      while (rest == number(1) && source + 1 < from.size()) {
        rest = from[++source];
      }
      const bool is_whole = rest == from[source];
      if (const auto outer = wanted.divided_by(rest); outer && rest != number(1)) {
        parts.push_back({rest, source, is_whole});
        wanted = *outer;
        rest = number(1);
      } else if (const auto inner = rest.divided_by(wanted)) {
        parts.push_back({wanted, source, false});
        rest = *inner;
        wanted = number(1);
      } else {
        return {};
      }
    }
    if (target == dim) {
      return parts;
    }
  }
  return {};
}

HeadOrder order_of_parts(const std::vector<Part>& parts) {
  const auto is_rows = [](const Part& part) { return !part.size.is_constant() && part.size.factor == 1; };
  const auto is_heads = [](const Part& part) { return part.size.is_constant(); };
  const auto first_heads = std::find_if(parts.begin(), parts.end(), is_heads);
  if (first_heads != parts.begin() && std::all_of(parts.begin(), first_heads, is_rows) &&
      std::all_of(first_heads, parts.end(), is_heads)) {
    return HeadOrder::kHeadsInRows;
  }
  const auto first_rows = std::find_if(parts.begin(), parts.end(), is_rows);
  if (first_rows != parts.begin() && std::all_of(parts.begin(), first_rows, is_heads) &&
      std::all_of(first_rows, parts.end(), is_rows)) {
    return HeadOrder::kRowsInHeads;
  }
  return HeadOrder::kUnknown;
}

// The node that makes `value`, alone or in a list.
Node* maker(Value* value) {
  return value->node()->kind() == c10::prim::ListUnpack ? value->node()->input()->node() : value->node();
}

// Which piece of its operand `value` is, if it is one along a dimension of a known number of elements, that of heads or
// of their features: its number, or where it begins. nullopt for any other value.
std::optional<int64_t> number_of_piece(SymbolicShapes& shapes, Value* value) {
  const bool is_listed = value->node()->kind() == c10::prim::ListUnpack;
  const Node* node = maker(value);
  const bool cuts = is_listed ? is_aten(node, {"chunk", "tensor_split", "split", "split_with_sizes", "unbind"})
                              : is_aten(node, {"slice", "narrow", "select"});
  const auto shape = cuts ? shapes.shape(node->input(0)) : std::nullopt;
  const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
  if (!dim || *dim == 0 || !(*shape)[*dim].is_constant()) {
    return std::nullopt;
  }
  if (is_listed) {
    return static_cast<int64_t>(value->offset());
  }
  const Value* start = node->namedInput(is_aten(node, {"select"}) ? "index" : "start");
  return is_none(start) ? 0 : constant_int(start);
}

// Whether `values` are the heads of one value, in the order of its features.
bool are_heads(SymbolicShapes& shapes, at::ArrayRef<Value*> values) {
  const Value* whole = nullptr;
  std::optional<int64_t> last;
  for (Value* value : values) {
    const auto piece = number_of_piece(shapes, value);
    if (!piece || *piece < 0 || (last && *piece <= *last) || (whole && whole != maker(value)->input(0))) {
      return false;
    }
    last = piece;
    whole = maker(value)->input(0);
  }
  return whole != nullptr;
}

// The place whose order `place` has, when `node` cuts or adds other dimensions.
std::optional<Place> before_cut(Node* node, size_t rank, size_t dim) {
  const bool adds = is_aten(node, {"unsqueeze"});
  const auto at = position(node->namedInput("dim"), rank + adds);
  if (!at) {
    return std::nullopt;
  }
  Value* self = node->namedInput("self");
  if (is_aten(node, {"select", "unbind", "squeeze"})) {  // squeeze: of a dimension of one element
    return Place{self, dim + (dim >= *at)};
  }
  if (adds) {
    return *at == dim ? std::nullopt : std::optional(Place{self, dim - (dim > *at)});
  }
  return *at == dim ? std::nullopt : std::optional(Place{self, dim});
}

// Goes from a value to what it was made of, until a node has put rows and heads into one dimension.
class OrderSearch {
 public:
  explicit OrderSearch(SymbolicShapes& shapes) : shapes_(shapes) {}

  HeadOrder of(const Place& place);

 private:
  HeadOrder of_view(Node* node, const Shape& to, size_t dim);
  HeadOrder of_joined(Node* node, size_t dim);
  HeadOrder of_operands(Node* node, const Place& place);
  HeadOrder of_first_known(at::ArrayRef<Value*> values, size_t rank, const Dim& size, size_t dim);

  SymbolicShapes& shapes_;
};

HeadOrder OrderSearch::of_view(Node* node, const Shape& to, size_t dim) {
  Value* self = node->input(0);
  const auto from = shapes_.shape(self);
  if (!from || dim >= to.size()) {
    return HeadOrder::kUnknown;
  }
  const std::vector<Part> parts = parts_of(*from, to, dim);
  if (parts.size() == 1 && parts.front().is_whole) {
    return of({self, parts.front().from});
  }
  return order_of_parts(parts);
}

HeadOrder OrderSearch::of_joined(Node* node, size_t dim) {
  const auto values = joined_tensors(node);
  const auto result = shapes_.shape(node->output());
  const auto at = result ? position(node->namedInput("dim"), result->size()) : std::nullopt;
  if (values.empty() || !at || is_aten(node, {"stack"})) {
    return HeadOrder::kUnknown;
  }
  if (*at != dim) {  // parts from elsewhere are joined element by element: one of known order tells
    return of_first_known(values, result->size(), (*result)[dim], dim);
  }
  const bool have_rows = std::all_of(values.begin(), values.end(), [&](const Value* value) {
    const auto part = shapes_.shape(value);
    return part && part->size() == result->size() && !(*part)[dim].is_constant() && (*part)[dim].factor == 1;
  });
  return have_rows && are_heads(shapes_, values) ? HeadOrder::kRowsInHeads : HeadOrder::kUnknown;
}

// Of an operation between tensors: the operand that has the dimension.
HeadOrder OrderSearch::of_operands(Node* node, const Place& place) {
  const auto result = shapes_.shape(place.value);
  return of_first_known(node->inputs(), result->size(), (*result)[place.dim], place.dim);
}

// The order of the first of `values` of that rank, and of that size in `dim`, whose order is known.
HeadOrder OrderSearch::of_first_known(at::ArrayRef<Value*> values, size_t rank, const Dim& size, size_t dim) {
  for (Value* value : values) {
    const auto sizes = is_tensor(value) ? shapes_.shape(value) : std::nullopt;
    if (sizes && sizes->size() == rank && (*sizes)[dim] == size) {
      const HeadOrder order = of({value, dim});
      if (order != HeadOrder::kUnknown) {
        return order;
      }
    }
  }
  return HeadOrder::kUnknown;
}

HeadOrder OrderSearch::of(const Place& place) {
  const auto result = shapes_.shape(place.value);
  if (!result || place.dim >= result->size() || (*result)[place.dim].is_constant()) {
    return HeadOrder::kUnknown;
  }
  if ((*result)[place.dim].factor == 1) {
    return HeadOrder::kHeadsInRows;
  }
  Node* node = maker(place.value);
  if (is_aten(node, {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"})) {
    return of_view(node, *result, place.dim);
  }
  if (is_aten(node, {"cat", "concat", "stack"})) {
    return of_joined(node, place.dim);
  }
  if (node->kind() == c10::prim::unchecked_cast) {
    return of({node->input(), place.dim});
  }
  if (is_elementwise(node) || is_aten(node, {"mul", "div", "add", "sub", "masked_fill", "where"})) {
    return of_operands(node, place);
  }
  if (is_aten(node, {"bmm", "matmul"})) {
    return place.dim + 2 < result->size() ? of_operands(node, place) : HeadOrder::kUnknown;
  }
  if (is_aten(node, {"transpose", "swapaxes", "swapdims", "permute"})) {
    const auto before = exchanged_dims(shapes_, node, result->size());
    return before ? of({node->input(0), (*before)[place.dim]}) : HeadOrder::kUnknown;
  }
  if (is_aten(node, {"repeat_interleave"})) {  // of rows of one head each
    const auto at = position(node->namedInput("dim"), result->size());
    const auto self = shapes_.shape(node->namedInput("self"));
    const bool repeats_rows = at && *at == place.dim && self && (*self)[*at].factor == 1;
    return repeats_rows             ? HeadOrder::kHeadsInRows
           : at && *at != place.dim ? of({node->namedInput("self"), place.dim})
                                    : HeadOrder::kUnknown;
  }
  if (is_aten(node, {"layer_norm", "rms_norm"})) {
    return place.dim + 1 < result->size() ? of({node->input(0), place.dim}) : HeadOrder::kUnknown;
  }
  if (is_aten(node, {"chunk", "tensor_split", "split", "split_with_sizes", "unbind", "slice", "narrow", "select",
                     "unsqueeze", "squeeze"})) {
    const auto self = node->inputs().size() > 1 ? shapes_.shape(node->namedInput("self")) : std::nullopt;
    const auto before = self ? before_cut(node, self->size(), place.dim) : std::nullopt;
    return before ? of(*before) : HeadOrder::kUnknown;
  }
  return HeadOrder::kUnknown;
}

}  // namespace

HeadOrder head_order(SymbolicShapes& shapes, Value* value) { return OrderSearch(shapes).of({value, 0}); }

}  // namespace torchgraft
