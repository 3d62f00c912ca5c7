#include <torchgraft/patch/graph/symbolic_layout.h>

#include <torchgraft/patch/graph/exchanged_dims.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>
#include <limits>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

std::optional<Shape> shape_of_piece(SymbolicShapes& shapes, const Node* node, int64_t piece) {
  const bool chunks = is_aten(node, {"chunk", "tensor_split"});
  const bool unbinds = is_aten(node, {"unbind"});
  if (!chunks && !unbinds && !is_aten(node, {"split", "split_with_sizes"})) {
    return std::nullopt;
  }
  auto result = shapes.shape(node->namedInput("self"));
  const auto dim = result ? position(node->namedInput("dim"), result->size()) : std::nullopt;
  if (!dim) {
    return std::nullopt;
  }
  if (unbinds) {
    result->erase(result->begin() + *dim);
    return result;
  }
  // chunk, split and split_with_sizes: how many pieces, or how large ones.
  const auto count = constant_int(node->input(1));
  const auto sizes = count ? std::nullopt : shapes.integers(node->input(1));
  if (chunks && count) {
    const auto part = (*result)[*dim].divided_by(number(*count));
    (*result)[*dim] = part ? *part : shapes.fresh();
  } else if (sizes && piece >= 0 && piece < static_cast<int64_t>(sizes->size())) {
    (*result)[*dim] = (*sizes)[piece];
  } else {
    (*result)[*dim] = count ? number(*count) : shapes.fresh();
  }
  return result;
}

namespace {

// Concatenated tensors agree in all sizes but `dim`. So the keys of a forward pass tell the sizes of a cache, which the
// graph does not.
void equate_parts(SymbolicShapes& shapes, const std::vector<const Value*>& parts, size_t dim, Shape& result) {
  for (const Value* part : parts) {
    Shape expected = result;
    expected[dim] = shapes.fresh();
    shapes.assume(part, expected);
    const auto sizes = shapes.shape(part);
    for (size_t i = 0; sizes && sizes->size() == result.size() && i < sizes->size(); ++i) {
      if (i != dim && !shapes.assume_equal((*sizes)[i], result[i]) && (*sizes)[i].is_constant()) {
        result[i] = (*sizes)[i];
      }
    }
  }
}

std::optional<Shape> concatenated(SymbolicShapes& shapes, const Node* node) {
  const Node* list = node->namedInput("tensors")->node();
  if (list->kind() != c10::prim::ListConstruct || list->inputs().empty()) {
    return std::nullopt;
  }
  // torch.cat skips tensors of shape [0]: Hugging Face's caches begin with one.
  std::vector<const Value*> parts;
  std::optional<Shape> result;
  const bool stacks = is_aten(node, {"stack"});
  for (const Value* part : list->inputs()) {
    const auto sizes = shapes.shape(part);
    if (!stacks && sizes == Shape{number(0)}) {
      continue;
    }
    parts.push_back(part);
    result = result ? result : sizes;
  }
  const auto dim = result ? position(node->namedInput("dim"), result->size() + stacks) : std::nullopt;
  if (!dim) {
    return std::nullopt;
  }
  if (stacks) {
    result->insert(result->begin() + *dim, number(static_cast<int64_t>(parts.size())));
    return result;
  }
  equate_parts(shapes, parts, *dim, *result);
  // Parts that are multiples of one size add up: [n d] and [m d] give [(n + m) d].
  Dim total{0, shapes.canonical((*result)[*dim]).symbols};
  for (const Value* part : parts) {
    const auto sizes = shapes.shape(part);
    if (!sizes || sizes->size() != result->size() || (*sizes)[*dim].symbols != total.symbols) {
      (*result)[*dim] = shapes.fresh();
      return result;
    }
    total.factor += (*sizes)[*dim].factor;
  }
  (*result)[*dim] = total;
  return result;
}

std::optional<Shape> reshaped(SymbolicShapes& shapes, const Shape& from, const Value* sizes) {
  auto result = shapes.integers(sizes);
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
  if (!inferred) {
    shapes.assume_equal_products(product(from), known);
    return result;
  }
  auto rest = product(from).divided_by(known);
  // A decoder may view its encoder's result with a batch size of its own: equate the two first dimensions.
  if (!rest && !from.empty() && inferred != &result->front() && shapes.assume_equal(from.front(), result->front())) {
    rest = shapes.canonical(product(from)).divided_by(shapes.canonical(known));
  }
  *inferred = rest ? *rest : shapes.fresh();
  return result;
}

std::optional<Shape> viewed(SymbolicShapes& shapes, const Node* node, Shape from) {
  const size_t rank = from.size();
  if (is_aten(node, {"view", "reshape", "_unsafe_view"})) {
    return reshaped(shapes, from, node->input(1));
  }
  if (is_aten(node, {"expand"})) {
    auto sizes = shapes.integers(node->namedInput("size"));
    const size_t added = sizes && sizes->size() >= rank ? sizes->size() - rank : 0;
    for (size_t i = added; sizes && i < sizes->size(); ++i) {
      if ((*sizes)[i] == number(-1)) {
        (*sizes)[i] = from[i - added];
      }
    }
    return sizes;
  }
  if (is_aten(node, {"flatten"})) {
    const auto start = position(node->namedInput("start_dim"), rank);
    const auto end = position(node->namedInput("end_dim"), rank);
    if (start && end && *start <= *end) {
      Shape flat(from.begin(), from.begin() + *start);
      flat.push_back(product(Shape(from.begin() + *start, from.begin() + *end + 1)));
      flat.insert(flat.end(), from.begin() + *end + 1, from.end());
      return flat;
    }
  }
  if (is_aten(node, {"unflatten"})) {
    const auto at = position(node->namedInput("dim"), rank);
    const auto sizes = at ? reshaped(shapes, {from[*at]}, node->namedInput("sizes")) : std::nullopt;
    if (sizes) {
      from.erase(from.begin() + *at);
      from.insert(from.begin() + *at, sizes->begin(), sizes->end());
      return from;
    }
  }
  return std::nullopt;
}

// transpose, swapaxes, swapdims, t, numpy_T and permute.
std::optional<Shape> exchanged(SymbolicShapes& shapes, const Node* node, const Shape& from) {
  const auto order = exchanged_dims(shapes, node, from.size());
  if (!order) {
    return std::nullopt;
  }
  Shape result;
  for (const size_t dim : *order) {
    result.push_back(from[dim]);
  }
  return result;
}

// squeeze, select, slice and narrow.
std::optional<Shape> cut_down(SymbolicShapes& shapes, const Node* node, Shape from) {
  if (node->inputs().size() < 2) {
    return std::nullopt;
  }
  const auto at = position(node->namedInput("dim"), from.size());
  if (!at) {
    return std::nullopt;
  }
  if (is_aten(node, {"squeeze", "select"})) {
    if (is_aten(node, {"select"}) || from[*at] == number(1)) {
      from.erase(from.begin() + *at);
      return from;
    }
    return std::nullopt;
  }
  if (is_aten(node, {"narrow"})) {
    from[*at] = shapes.integer(node->namedInput("length"));
    return from;
  }
  if (constant_int(node->namedInput("step")).value_or(0) != 1) {
    from[*at] = shapes.fresh();
    return from;
  }
  const Dim start = is_none(node->namedInput("start")) ? number(0) : shapes.integer(node->namedInput("start"));
  const Dim end = is_none(node->namedInput("end")) ? number(std::numeric_limits<int64_t>::max())
                                                   : shapes.integer(node->namedInput("end"));
  const Dim size = from[*at];
  const bool to_the_end = end == size || (end.is_constant() && end.factor == std::numeric_limits<int64_t>::max());
  if (start == number(0)) {
    const bool known = end.is_constant() && size.is_constant();
    const int64_t last = end.factor < 0 ? end.factor + size.factor : end.factor;
    from[*at] = to_the_end ? size : known ? number(std::clamp<int64_t>(last, 0, size.factor)) : shapes.fresh();
  } else if (size.is_constant() && start.is_constant()) {
    const auto absolute = [&](const Dim& bound) {
      const int64_t value = bound.factor < 0 ? bound.factor + size.factor : bound.factor;
      return std::clamp<int64_t>(value, 0, size.factor);
    };
    const bool known = to_the_end || end.is_constant();
    const int64_t last = to_the_end ? size.factor : absolute(end);
    from[*at] = known ? number(std::max<int64_t>(0, last - absolute(start))) : shapes.fresh();
  } else {
    from[*at] = shapes.fresh();
  }
  return from;
}

// repeat: as many copies along each dimension, of which it may add some in front.
std::optional<Shape> tiled(SymbolicShapes& shapes, const Node* node, const Shape& from) {
  auto result = shapes.integers(node->namedInput("repeats"));
  if (!result || result->size() < from.size()) {
    return std::nullopt;
  }
  const size_t added = result->size() - from.size();
  for (size_t i = 0; i < from.size(); ++i) {
    (*result)[added + i] = (*result)[added + i] * from[i];
  }
  return result;
}

// repeat_interleave of each element equally often, along one dimension.
std::optional<Shape> repeated(const Node* node, Shape from) {
  if (node->inputs().size() < 3 || is_tensor(node->namedInput("repeats"))) {  // one of numbers in a tensor
    return std::nullopt;
  }
  const auto times = constant_int(node->namedInput("repeats"));
  const auto at = position(node->namedInput("dim"), from.size());
  if (!times || !at) {
    return std::nullopt;
  }
  from[*at] = product({from[*at], number(*times)});
  return from;
}

}  // namespace

std::optional<Shape> shape_of_written(SymbolicShapes& shapes, const Node* node) {
  if (const auto known = shapes.shape(node->namedInput("self"))) {
    return known;
  }
  std::optional<Shape> result;
  std::optional<size_t> dim;
  if (is_aten(node, {"index_put"})) {  // the one index that is not `:`
    const Node* indices = node->namedInput("indices")->node();
    result = shapes.shape(node->namedInput("values"));
    result = result && result->size() >= 3 ? result : std::nullopt;  // else they may broadcast
    for (size_t i = 0; indices->kind() == c10::prim::ListConstruct && i < indices->inputs().size(); ++i) {
      if (!is_none(indices->input(i))) {
        dim = dim ? std::nullopt : std::optional(i);
        result = dim ? result : std::nullopt;
      }
    }
  } else if (is_aten(node, {"index_copy", "slice_scatter", "scatter"})) {
    const char* source = is_aten(node, {"index_copy"}) ? "source" : "src";
    if (node->schema().argumentIndexWithName(source)) {
      const Value* written = node->namedInput(source);
      written = is_aten(written->node(), {"clone"}) ? written->node()->namedInput("self") : written;
      // A write into a slice takes the slice's shape (follow_writes.cpp, remove_writes.cpp), which is the cache's.
      const bool is_fitted = is_aten(written->node(), {"expand_as"}) && !shapes.shape(written);
      result = shapes.shape(is_fitted ? written->node()->namedInput("self") : written);
      result = is_fitted && result && result->size() < 3 ? std::nullopt : result;  // it may broadcast
      dim = result ? position(node->namedInput("dim"), result->size()) : std::nullopt;
    }
  }
  if (!result || !dim || *dim >= result->size()) {
    return std::nullopt;
  }
  (*result)[*dim] = shapes.fresh();
  shapes.assume(node->namedInput("self"), *result);
  return result;
}

namespace {

// x[..., [i, j]] with constant indices of one dimension: Falcon takes the heads of keys so.
std::optional<Shape> indexed(const Node* node, Shape from) {
  const auto indices = resolve_constant(node->namedInput("indices"));
  if (!indices || !indices->isList() || indices->toListRef().size() > from.size()) {
    return std::nullopt;
  }
  bool is_one = false;
  for (size_t i = 0; i < indices->toListRef().size(); ++i) {
    const c10::IValue& index = indices->toListRef()[i];
    if (index.isNone()) {
      continue;
    }
    if (is_one || !index.isTensor() || index.toTensor().dim() != 1 || index.toTensor().scalar_type() != at::kLong) {
      return std::nullopt;
    }
    is_one = true;
    from[i] = number(index.toTensor().numel());
  }
  return is_one ? std::optional(from) : std::nullopt;
}

}  // namespace

std::optional<Shape> shape_of_layout(SymbolicShapes& shapes, const Node* node) {
  if (is_aten(node, {"cat", "concat", "stack"})) {
    return concatenated(shapes, node);
  }
  if (node->inputs().empty() || !node->input(0)->type()->isSubtypeOf(*c10::TensorType::get())) {
    return std::nullopt;
  }
  if (is_aten(node, {"expand_as", "view_as", "reshape_as"})) {
    return shapes.shape(node->namedInput("other"));
  }
  if (is_aten(node, {"gather"})) {
    return shapes.shape(node->namedInput("index"));
  }
  const auto from = shapes.shape(node->input(0));
  if (!from) {
    // A view gives the rank of its result, and all sizes but -1, even when its input is unknown.
    auto sizes = is_aten(node, {"view", "reshape", "expand"}) ? shapes.integers(node->input(1)) : std::nullopt;
    for (size_t i = 0; sizes && i < sizes->size(); ++i) {
      (*sizes)[i] = (*sizes)[i] == number(-1) ? shapes.fresh() : (*sizes)[i];
    }
    return sizes;
  }
  if (is_aten(node, {"view", "reshape", "_unsafe_view", "expand", "flatten", "unflatten"})) {
    return viewed(shapes, node, *from);
  }
  if (is_aten(node, {"transpose", "swapaxes", "swapdims", "t", "numpy_T", "permute"})) {
    return exchanged(shapes, node, *from);
  }
  if (is_aten(node, {"squeeze", "select", "slice", "narrow"})) {
    return cut_down(shapes, node, *from);
  }
  if (is_aten(node, {"index"})) {
    return indexed(node, *from);
  }
  if (is_aten(node, {"repeat", "repeat_interleave"})) {
    return is_aten(node, {"repeat"}) ? tiled(shapes, node, *from) : repeated(node, *from);
  }
  if (is_aten(node, {"unsqueeze"})) {
    const auto at = position(node->namedInput("dim"), from->size() + 1);
    Shape result = *from;
    if (at) {
      result.insert(result.begin() + *at, number(1));
      return result;
    }
  }
  if (is_aten(node, {"mean", "sum", "amax"}) && node->inputs().size() > 2) {
    const auto dims = shapes.integers(node->namedInput("dim"));
    const auto keeps = resolve_constant(node->namedInput("keepdim"));
    const bool last = dims && dims->size() == 1 && keeps && keeps->isBool() && keeps->toBool() &&
                      ((*dims)[0] == number(-1) || (*dims)[0] == number(static_cast<int64_t>(from->size()) - 1));
    Shape result = *from;
    if (last) {
      result.back() = number(1);
      return result;
    }
  }
  return std::nullopt;
}

}  // namespace torchgraft
