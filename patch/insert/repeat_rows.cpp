#include <torchgraft/patch/insert/repeat_rows.h>

#include <torchgraft/patch/adapters/parallel_rows.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/heads_of_masks.h>
#include <torchgraft/patch/insert/repeat_later.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <iterator>
#include <string>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// `repeated`: dimension `dim` is the batch. `repeated_like`: that which has as many sizes as there are rows, if one
// has; masks [1, 1, S, S] and tables stay as they are. `heads`: those of a mask [B * heads, S, S], or 1.
constexpr const char* kRepeated = R"python(
def repeated(x: Tensor, index: Optional[Tensor], rows: int, dim: int, name: str) -> Tensor:
    if index is None:
        return x
    else:
        assert x.dim() > dim and x.size(dim) == rows, "forward: a composition with a Parallel repeats the batch's " \
            "rows: expected {} of them along dimension {} of '{}', got the size {}".format(rows, dim, name, x.size())
        return x.index_select(dim, index)

def repeated_like(x: Tensor, index: Optional[Tensor], rows: int, sequence_first: bool, has_none: bool,
                  heads: int, name: str) -> Tensor:
    if index is None:
        return x
    elif heads > 1 and x.dim() == 3 and x.size(0) == 1:
        return x
    elif heads > 1 and x.dim() == 3 and x.size(0) == rows * heads:
        return x.unflatten(0, [rows, heads]).index_select(0, index).flatten(0, 1)
    else:
        is_first = x.dim() > 0 and x.size(0) == rows
        if has_none:
            may_have = is_first or (sequence_first and x.dim() > 1 and x.size(1) == rows)
            assert rows == 1 or not may_have, "forward: a composition with a Parallel repeats the batch's {} rows, " \
                "and '{}' {}, which had none in the example of compose(), may have them; pass another number of " \
                "rows, or activate the parts of the Parallel one by one".format(rows, name, x.size())
            return x
        if sequence_first and x.dim() > 1 and x.size(1) == rows:
            assert not is_first, "forward: a composition with a Parallel repeats the batch's {} rows, and either " \
                "dimension of '{}' {} may be theirs; pass another number of rows, or activate the parts of the " \
                "Parallel one by one".format(rows, name, x.size())
            return x.index_select(1, index)
        if is_first:
            return x.index_select(0, index)
        return x

def repeated_optional(x: Optional[Tensor], index: Optional[Tensor], rows: int, sequence_first: bool, has_none: bool,
                      heads: int, name: str) -> Optional[Tensor]:
    if x is None:
        return None
    else:
        return repeated_like(x, index, rows, sequence_first, has_none, heads, name)

def check_rows(x: Optional[Tensor], index: Optional[Tensor], rows: int, sequence_first: bool, name: str,
               counted: str) -> bool:
    if x is None or index is None:
        return True
    else:
        has_rows = x.dim() == 0 or x.size(0) == rows or x.size(0) == 1
        if sequence_first and x.dim() > 1:
            has_rows = has_rows or x.size(1) == rows or x.size(1) == 1
        assert has_rows, "forward: a composition with a Parallel repeats the {} rows of '{}', and what the layers " \
            "read is made of '{}' {}, too, whose rows cannot be told; give both as many rows, or activate the parts " \
            "of the Parallel one by one".format(rows, counted, name, x.size())
        return True

def is_like_tensor(x: Tensor, rank: int, dtype: int, dim: int, other: int, rows: int) -> bool:
    like = x.dim() == rank and x.dtype == dtype
    if like and dim >= 0:
        like = x.size(dim) == rows
    elif like and rows > 1:
        like = not (rank > 0 and x.size(0) == rows) and not (other == 1 and rank > 1 and x.size(1) == rows)
    return like

def is_like_optional(x: Optional[Tensor], rank: int, dtype: int, dim: int, other: int, rows: int) -> bool:
    if x is None:
        return rank < 0
    else:
        return is_like_tensor(x, rank, dtype, dim, other, rows)

def unless(index: Optional[Tensor], condition: bool) -> Optional[Tensor]:
    if condition:
        return None
    return index

def rows_and_device(x: Tensor, dim: int) -> Tuple[int, Device]:
    return x.size(dim), x.device
)python";

Value* call(Graph& graph, const char* source, const char* function, std::vector<Value*> arguments) {
  return torch::jit::insertGraph(graph, *compile_graph(source, function), arguments)[0];
}

bool is_optional_tensor(const Value* value) { return *value->type() == *c10::OptionalType::ofTensor(); }

bool may_have_tensors(const c10::TypePtr& type) {
  const auto contained = type->containedTypes();
  return type->kind() == c10::TypeKind::TensorType || type->kind() == c10::TypeKind::ClassType ||
         type->kind() == c10::TypeKind::AnyType || std::any_of(contained.begin(), contained.end(), may_have_tensors);
}

// Adds to `found` the arguments of which `value` is made, not by way of sizes or of an attention.
void add_sources(Value* value, std::set<Value*>& found) {
  std::vector<Value*> frontier = {value};
  std::set<Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (node->kind() == c10::prim::Param && (is_tensor(frontier[i]) || is_optional_tensor(frontier[i]))) {
      found.insert(frontier[i]);
    }
    if (tells_no_numbers(node) || is_aten(node, {"scaled_dot_product_attention"})) {
      continue;
    }
    std::vector<Value*> next(node->inputs().begin(), node->inputs().end());
    for (torch::jit::Block* block : node->blocks()) {
      next.insert(next.end(), block->outputs().begin(), block->outputs().end());
    }
    for (Value* input : next) {
      if (seen.insert(input).second) {
        frontier.push_back(input);
      }
    }
  }
}

// The argument of which `tokens` is a function that keeps all dimensions where they are; null where it is of none.
Value* argument_of(Value* tokens) {
  const auto keeps = [](const Node* node) {
    return is_elementwise(node) || is_aten(node, {"layer_norm", "rms_norm", "dropout", "to", "contiguous", "detach"});
  };
  while (keeps(tokens->node())) {
    tokens = tokens->node()->input(0);
  }
  return tokens->node()->kind() == c10::prim::Param && is_tensor(tokens) ? tokens : nullptr;
}

}  // namespace

RowRepeater::RowRepeater(Graph& graph, const GraphSites& sites, const Module& root) : graph_(graph), root_(root) {
  for (const Layer& layer : sites.structure.layers) {
    TORCH_CHECK(layer.cache == CacheKind::kNone, "compose: no Parallel can be in a module that keeps keys and values ",
                "of earlier passes, as layer ", layer.number, " does (", to_string(layer.cache), "): a pass would ",
                "repeat rows that are repeated already; compose each of its parts under a name of its own, and give ",
                "every row once for each part, with adapter_ids");
  }
  for (size_t i = 1; i < graph.inputs().size(); ++i) {
    const Value* input = graph.inputs()[i];
    TORCH_CHECK(is_tensor(input) || is_optional_tensor(input) || !may_have_tensors(input->type()), "compose: a ",
                "Parallel repeats the rows of forward's arguments, and '", input->debugNameBase(), "' is ",
                input->type()->repr_str(), ", whose rows cannot be told; compose each of its parts under a name of ",
                "its own, and give every row once for each part, with adapter_ids");
  }
  const Writes writes(graph.shared_from_this());
  for (const Value* input : graph.inputs().slice(1)) {
    TORCH_CHECK(!is_tensor(input) || !writes.reach(input), "compose: a Parallel repeats the rows of forward's ",
                "arguments, and forward may write into '", input->debugNameBase(), "', which would not reach the ",
                "caller's tensor; compose each of its parts under a name of its own, and give every row once for each ",
                "part, with adapter_ids");
  }
  find_batch(sites, root);
  for_each_node(graph.block(), [&](const Node* node) {
    if (is_aten(node, {"scaled_dot_product_attention"})) {
      add_heads_of_masks(node, heads_of_masks_);
    }
  });
}

void RowRepeater::find_batch(const GraphSites& sites, const Module& root) {
  SymbolicShapes shapes(root);
  for (const LayerSites& layer : sites.layers) {
    const LinearSite& query = layer.query;
    if (query.node) {
      add_sources(linear_input(query.node), sources_);
    }
    sequence_first_ = sequence_first_ || query.sequence_first;
    if (Value* argument = query.node ? argument_of(linear_input(query.node)) : nullptr) {
      known_.emplace(argument, query.sequence_first ? 1 : 0);
      counted_ = counted_ ? counted_ : argument;
    }
    const auto tokens = query.node ? shapes.shape(linear_input(query.node)) : std::nullopt;
    if (!tokens || tokens->size() != 3) {
      continue;
    }
    const Dim batch = (*tokens)[query.sequence_first ? 1 : 0];
    for (size_t i = 1; i < graph_.inputs().size() && !batch.is_constant(); ++i) {
      Value* input = graph_.inputs()[i];
      const auto shape = is_tensor(input) ? shapes.shape(input) : std::nullopt;
      for (size_t dim = 0; shape && dim < shape->size(); ++dim) {
        if ((*shape)[dim] == shapes.canonical(batch)) {
          known_.emplace(input, static_cast<int64_t>(dim));
          counted_ = counted_ ? counted_ : input;
        }
      }
    }
  }
  for (size_t i = 1; i < graph_.inputs().size() && !counted_ && !sequence_first_; ++i) {
    counted_ = is_tensor(graph_.inputs()[i]) ? graph_.inputs()[i] : nullptr;
  }
  TORCH_CHECK(counted_,
              "compose: a Parallel repeats the rows of forward's arguments, and none of these tells how many ",
              "there are; compose each of its parts under a name of its own, and give every row once for each part, ",
              "with adapter_ids");
  known_.emplace(counted_, 0);
  sources_.erase(counted_);
}

int64_t RowRepeater::rows_in(const std::vector<c10::IValue>& arguments) const {
  const size_t at = counted_->offset() - 1;
  const int64_t dim = known_.at(counted_);
  const bool has_rows = at < arguments.size() && arguments[at].isTensor() && arguments[at].toTensor().dim() > dim;
  return has_rows ? arguments[at].toTensor().size(dim) : 0;
}

Value* RowRepeater::is_like(Value* input, const c10::IValue& example, int64_t example_rows, Value* rows) {
  const auto constant = [&](const c10::IValue& value) { return graph_.insertConstant(value); };
  if (is_tensor(input) || is_optional_tensor(input)) {
    int64_t rank = -1;
    int64_t dtype = 0;
    int64_t dim = -1;
    if (example.isTensor()) {
      const at::Tensor& tensor = example.toTensor();
      rank = tensor.dim();
      dtype = static_cast<int64_t>(tensor.scalar_type());
      const auto known = known_.find(input);
      for (int64_t i = 0; known == known_.end() && i < std::min<int64_t>(rank, sequence_first_ ? 2 : 1); ++i) {
        dim = dim < 0 && tensor.size(i) == example_rows ? i : dim;
      }
      dim = known == known_.end() ? dim : known->second;
    }
    const char* function = is_tensor(input) ? "is_like_tensor" : "is_like_optional";
    const int64_t other = sequence_first_ ? 1 : 0;
    return call(graph_, kRepeated, function,
                {input, constant(rank), constant(dtype), constant(dim), constant(other), rows});
  }
  if (example.isNone()) {
    return graph_.insert(c10::aten::__is__, {input, constant(c10::IValue())});
  }
  const bool is_simple = (example.isInt() && input->type()->cast<c10::IntType>()) ||
                         (example.isDouble() && input->type()->cast<c10::FloatType>()) ||
                         (example.isBool() && input->type()->cast<c10::BoolType>());
  return is_simple ? graph_.insert(c10::aten::eq, {input, example}) : nullptr;
}

Value* RowRepeater::is_like(const std::vector<c10::IValue>& example, Value* rows) {
  Value* all = nullptr;
  for (size_t i = 0; i < example.size(); ++i) {
    Value* one = is_like(graph_.inputs()[i + 1], example[i], rows_in(example), rows);
    if (!one) {
      return nullptr;
    }
    all = all ? graph_.insert(c10::aten::__and__, {all, one}) : one;
  }
  return all;
}

void RowRepeater::operator()(const std::vector<NamedComposition>& compositions, int64_t first_id,
                             const std::vector<std::vector<c10::IValue>>& examples) {
  LatePlace late(graph_);
  Value* ids = graph_.inputs().back();
  WithInsertPoint guard(*graph_.nodes().begin());
  Node* adapters =
      graph_.insertNode(graph_.create(c10::prim::GetAttr, {graph_.inputs()[0]}, 1)->s_(c10::attr::name, "adapters"));
  const auto constant = [&](const c10::IValue& value) { return graph_.insertConstant(value); };
  adapters->output()->setType(graph_.inputs()[0]->type()->expectRef<c10::ClassType>().getAttribute("adapters"));
  Value* active = graph_.insertGetAttr(adapters->output(), "active");
  Value* counts = call(graph_, kRepeated, "rows_and_device", {counted_, constant(known_.at(counted_))});
  Node* unpack = graph_.insertNode(graph_.createTupleUnpack(counts));
  Value* rows = unpack->outputs()[0];
  const std::vector<int64_t> channels = channels_of(compositions);
  Value* index = call(graph_, kParallelRows, "repeated_index",
                      {ids, active, rows, unpack->outputs()[1], constant(first_id), constant(channels)});
  Value* repeated_ids = call(graph_, kParallelRows, "given_ids", {ids, index});
  Node* behind_ids = graph_.insertNode(graph_.createNone());  // dead code in the end
  for (Value* source : sources_) {
    call(graph_, kRepeated, "check_rows",
         {source, index, rows, constant(sequence_first_), constant(std::string(source->debugNameBase())),
          constant(std::string(counted_->debugNameBase()))});
  }
  std::vector<std::pair<Value*, Value*>> replaced;
  for (size_t i = 1; i + 1 < graph_.inputs().size(); ++i) {
    Value* input = graph_.inputs()[i];
    if (Value* value = repeated(input, index, rows, examples)) {
      replaced.emplace_back(input, value);
    }
  }
  Node* end = graph_.insertNode(graph_.createNone());
  ids->replaceAllUsesAfterNodeWith(end, repeated_ids);
  for (const auto& [from, to] : replaced) {
    from->replaceAllUsesAfterNodeWith(end, to);
  }
  const auto most = std::max_element(channels.begin(), channels.end());
  for (const std::vector<c10::IValue>& example : examples) {
    const int64_t id = first_id + (most - channels.begin());
    const bool does = *most > 1 && late.try_with(root_, example, rows_in(example), id, *most, replaced);
    WithInsertPoint at_ids(behind_ids);
    Value* is_late = does ? is_like(example, rows) : nullptr;
    if (is_late) {
      Value* training = graph_.insertGetAttr(adapters->output(), "training");
      is_late = graph_.insert(c10::aten::__and__, {is_late, graph_.insert(c10::aten::__not__, {training})});
      Value* at_top = call(graph_, kRepeated, "unless", {index, is_late});
      index->replaceAllUsesAfterNodeWith(behind_ids, at_top);
      Value* is_early = graph_.insert(c10::aten::__not__, {is_late});
      late.insert(call(graph_, kRepeated, "unless", {index, is_early}), rows);
      break;
    }
  }
}

// Whether no example of several rows gives `input` any.
bool RowRepeater::has_no_rows(const Value* input, const std::vector<std::vector<c10::IValue>>& examples) const {
  const size_t at = input->offset() - 1;
  bool is_shown = false;
  for (const std::vector<c10::IValue>& example : examples) {
    const int64_t rows = rows_in(example);
    if (rows < 2 || at >= example.size() || !example[at].isTensor()) {
      continue;
    }
    const at::Tensor& tensor = example[at].toTensor();
    const bool is_first = tensor.dim() > 0 && tensor.size(0) == rows;
    if (is_first || (sequence_first_ && tensor.dim() > 1 && tensor.size(1) == rows)) {
      return false;
    }
    is_shown = true;
  }
  return is_shown;
}

Value* RowRepeater::repeated(Value* input, Value* index, Value* rows,
                             const std::vector<std::vector<c10::IValue>>& examples) {
  const auto constant = [&](const c10::IValue& value) { return graph_.insertConstant(value); };
  Value* name = constant(std::string(input->debugNameBase()));
  if (const auto known = known_.find(input); known != known_.end()) {
    return call(graph_, kRepeated, "repeated", {input, index, rows, constant(known->second), name});
  }
  if (!is_tensor(input) && !is_optional_tensor(input)) {
    return nullptr;
  }
  const auto heads = heads_of_masks_.find(input);
  const char* function = is_tensor(input) ? "repeated_like" : "repeated_optional";
  return call(graph_, kRepeated, function,
              {input, index, rows, constant(sequence_first_), constant(has_no_rows(input, examples)),
               constant(heads == heads_of_masks_.end() ? int64_t{1} : heads->second), name});
}

}  // namespace torchgraft
