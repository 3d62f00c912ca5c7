#include <torchgraft/patch/insert/repeat_later.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <utility>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

constexpr const char* kLate = R"python(
def check(holds: bool, name: str) -> None:
    assert holds, "forward: a composition with a Parallel repeats rows before the first adapter, and a value there, " \
        "'{}', has another shape than on the example inputs; compose() with an example of such inputs, or give every " \
        "row once for each part of the Parallel, with adapter_ids".format(name)

def late_rows(x: Tensor, index: Optional[Tensor], rows: int, rank: int, dim: int, name: str) -> Tensor:
    if index is None:
        return x
    else:
        check(x.dim() == rank and x.size(dim) == rows, name)
        return x.index_select(dim, index)

def late_optional(x: Optional[Tensor], index: Optional[Tensor], rows: int, rank: int, dim: int,
                  name: str) -> Optional[Tensor]:
    if x is None:
        return None
    else:
        return late_rows(x, index, rows, rank, dim, name)

def late_none(x: Optional[Tensor], index: Optional[Tensor], rows: int, rank: int, dim: int,
              name: str) -> Optional[Tensor]:
    check(x is None or index is None, name)
    return x

def late_count(x: int, index: Optional[Tensor], rows: int, rank: int, dim: int, name: str) -> int:
    if index is None:
        return x
    else:
        check(x % rows == 0, name)
        return x // rows * index.size(0)

def late_number(x: Tensor, index: Optional[Tensor], rows: int, rank: int, dim: int, name: str) -> Tensor:
    if index is None:
        return x
    else:
        check(x.dim() == 0 and int(x) % rows == 0, name)
        return torch.floor_divide(x, rows) * index.size(0)

def late_free(x: Tensor, index: Optional[Tensor], rows: int, rank: int, dim: int, name: str) -> Tensor:
    check(index is None or x.dim() == rank, name)
    return x
)python";

void visit_inputs(const Node* node, const std::function<void(const Value*)>& visit) {
  for (const Value* input : node->inputs()) {
    visit(input);
  }
  for (const Block* block : node->blocks()) {
    for (const Node* inner : block->nodes()) {
      visit_inputs(inner, visit);
    }
    for (const Value* output : block->outputs()) {
      visit(output);
    }
  }
}

bool reads_any(const Node* node, const std::set<const Value*>& values) {
  bool found = false;
  visit_inputs(node, [&](const Value* input) { found = found || values.count(input) > 0; });
  return found;
}

// Whether a size is all that `value` is: no number that was computed from sizes.
bool is_size(const Value* value) {
  const Node* node = value->node();
  const bool wraps = node->kind() == c10::prim::NumToTensor || node->kind() == c10::aten::Int;
  return wraps ? is_size(node->input(0))
               : node->kind() == c10::aten::size && value->type()->kind() != c10::TypeKind::ListType;
}

// Whether all branches of `node` ask only whether an argument is None, which is part of its kind.
bool branches_by_kind(const Node* node) {
  if (node->blocks().empty()) {
    return true;
  }
  const Node* condition = node->kind() == c10::prim::If ? node->input()->node() : nullptr;
  if (!condition || (condition->kind() != c10::aten::__is__ && condition->kind() != c10::aten::__isnot__)) {
    return false;
  }
  return std::all_of(node->blocks().begin(), node->blocks().end(), [](const Block* block) {
    return std::all_of(block->nodes().begin(), block->nodes().end(), branches_by_kind);
  });
}

bool agree(const at::Tensor& a, const at::Tensor& b) {
  if (!at::isFloatingType(a.scalar_type())) {
    return a.equal(b);
  }
  const double tolerance = a.scalar_type() == at::kDouble ? 1e-8 : a.scalar_type() == at::kFloat ? 1e-4 : 3e-2;
  return at::allclose(a, b, tolerance, tolerance, /*equal_nan=*/true);
}

bool takes_none(const Value* value) { return *value->type() == *c10::OptionalType::ofTensor(); }

// The value of `copy`, a copy of `graph`, that stands where `value` stands.
Value* counterpart(const Graph& graph, Graph& copy, const Value* value) {
  if (value->node()->kind() == c10::prim::Param) {
    return copy.inputs()[value->offset()];
  }
  auto own = graph.nodes().begin();
  for (Node* node : copy.nodes()) {
    if (*own == value->node()) {
      return node->outputs()[value->offset()];
    }
    ++own;
  }
  TORCH_INTERNAL_ASSERT(false, "a value of an inner block crosses the place");
}

}  // namespace

bool tells_no_numbers(const Node* node) {
  return is_aten(node, {"size", "len", "dim", "is_floating_point"}) || node->kind() == c10::prim::dtype ||
         node->kind() == c10::prim::device || node->kind() == c10::prim::layout;
}

LatePlace::LatePlace(Graph& graph) : graph_(graph) {
  find();
  for_each_node(graph.block(), [&](const Node* node) {
    // A repeated value shares no memory with others, and what is run for an example must not be seen.
    place_ = is_writer(node) || draws_random_numbers(node) ? nullptr : place_;
  });
}

void LatePlace::find() {
  std::set<const Value*> of_ids = {graph_.inputs().back()};
  std::set<const Value*> of_inputs(graph_.inputs().begin() + 1, graph_.inputs().end() - 1);
  std::set<const Value*> of_numbers = of_inputs;  // not by way of sizes alone
  bool branches = false;                          // by what the inputs are: another input may go another way
  std::vector<Value*> made(graph_.inputs().begin() + 1, graph_.inputs().end() - 1);
  for (Node* node : graph_.nodes()) {
    const bool has_ids = reads_any(node, of_ids);
    const bool has_inputs = reads_any(node, of_inputs);
    if ((has_ids && has_inputs) || node->kind() == c10::prim::SetAttr) {
      place_ = has_ids ? node : nullptr;
      break;
    }
    branches = branches || (has_inputs && !branches_by_kind(node));
    const bool has_numbers = !tells_no_numbers(node) && reads_any(node, of_numbers);
    for (Value* output : node->outputs()) {
      if (has_ids) {
        of_ids.insert(output);
      }
      if (has_numbers) {
        of_numbers.insert(output);
      }
      if (has_inputs) {
        of_inputs.insert(output);
        made.push_back(output);
      }
    }
  }
  place_ = branches ? nullptr : place_;
  if (!place_) {
    return;
  }
  std::set<const Value*> used(graph_.outputs().begin(), graph_.outputs().end());
  for (Node* node = place_; node != graph_.return_node(); node = node->next()) {
    visit_inputs(node, [&](const Value* input) { used.insert(input); });
  }
  for (Value* value : made) {
    if (used.count(value)) {
      const bool is_argument = value->node()->kind() == c10::prim::Param;
      live_.push_back({.value = value, .is_of_numbers = !is_argument && of_numbers.count(value) > 0});
    }
  }
}

std::vector<c10::IValue> LatePlace::run(const Module& root, std::vector<c10::IValue> arguments,
                                        const at::Tensor& ids) const {
  const std::shared_ptr<Graph> copy = graph_.copy();
  std::vector<Value*> outputs;
  for (const Live& live : live_) {
    outputs.push_back(counterpart(graph_, *copy, live.value));
  }
  auto own = graph_.nodes().begin();
  Node* end = nullptr;
  for (Node* node : copy->nodes()) {
    end = *own == place_ ? node : end;
    ++own;
  }
  while (copy->outputs().size() > 0) {
    copy->eraseOutput(0);
  }
  for (Value* output : outputs) {
    copy->registerOutput(output);
  }
  for (bool is_last = false; !is_last;) {
    Node* last = copy->return_node()->prev();
    is_last = last == end;
    last->destroy();
  }
  torch::jit::EliminateDeadCode(copy);
  arguments.insert(arguments.begin(), root._ivalue());
  arguments.emplace_back(ids);
  const at::NoGradGuard guard;
  torch::jit::Code code(copy, "repeat_rows");
  torch::jit::InterpreterState(code).run(arguments);
  return arguments;
}

bool LatePlace::tell(Live& live, const c10::IValue& once, const c10::IValue& repeated, const at::Tensor& index) const {
  live.kind = Kind::kFree;
  const int64_t all = index.size(0);
  const int64_t rows = index.max().item<int64_t>() + 1;
  if (once.isNone() || repeated.isNone()) {
    live.kind = Kind::kNone;
    return once.isNone() && repeated.isNone() && takes_none(live.value);
  }
  if (once.isInt()) {
    live.kind = once.toInt() == repeated.toInt() ? Kind::kFree : Kind::kCount;
    if (!is_size(live.value)) {
      return false;
    }
    return live.kind == Kind::kFree || (once.toInt() % rows == 0 && once.toInt() / rows * all == repeated.toInt());
  }
  if (!once.isTensor()) {
    return false;
  }
  const at::Tensor& a = once.toTensor();
  const at::Tensor& b = repeated.toTensor();
  live.rank = a.dim();
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  if (a.sizes() == b.sizes() && agree(a, b)) {  // numbers of another input may differ by its rows
    return !live.is_of_numbers && (a.dim() > 0 || is_size(live.value));
  }
  if (a.dim() == 0 && a.scalar_type() == at::kLong && !takes_none(live.value)) {
    live.kind = Kind::kCount;
    return is_size(live.value) && a.item<int64_t>() % rows == 0 && a.item<int64_t>() / rows * all == b.item<int64_t>();
  }
  live.kind = Kind::kRows;
  for (live.dim = 0; live.dim < a.dim(); ++live.dim) {
    if (a.size(live.dim) == rows && b.size(live.dim) == all) {
      const at::Tensor expected = a.index_select(live.dim, index.to(a.device()));
      return expected.sizes() == b.sizes() && agree(expected, b);
    }
  }
  return false;
}

bool LatePlace::try_with(const Module& root, const std::vector<c10::IValue>& arguments, int64_t rows, int64_t id,
                         int64_t channels, const std::vector<std::pair<Value*, Value*>>& at_top) {
  if (!place_ || rows < 1) {
    return false;
  }
  for (Live& live : live_) {
    for (const auto& [input, replaced] : at_top) {
      live.value = live.value == input ? replaced : live.value;
    }
  }
  const auto is_tensor_value = [](const c10::IValue& argument) { return argument.isTensor(); };
  const auto first = std::find_if(arguments.begin(), arguments.end(), is_tensor_value);
  const at::Tensor plain = at::full({rows}, -1, at::TensorOptions(at::kLong).device(first->toTensor().device()));
  at::Tensor ids = plain.clone();
  ids[0] = id;
  const at::Tensor index = at::cat({at::arange(rows, plain.options()), at::zeros({channels - 1}, plain.options())});
  std::vector<c10::IValue> once;
  std::vector<c10::IValue> repeated;
  try {
    once = run(root, arguments, plain);
    repeated = run(root, arguments, ids);
  } catch (const std::exception&) {
    return false;  // arguments that were made up
  }
  for (size_t i = 0; i < live_.size(); ++i) {
    if (!tell(live_[i], once[i], repeated[i], index)) {
      return false;
    }
  }
  return true;
}

void LatePlace::insert(Value* index, Value* rows) {
  WithInsertPoint guard(place_);
  for (const Live& live : live_) {
    const bool is_tensor_value = is_tensor(live.value);
    const bool is_optional = takes_none(live.value);
    const char* function = nullptr;
    switch (live.kind) {
      case Kind::kNone:
        function = "late_none";
        break;
      case Kind::kCount:
        function = is_tensor_value ? "late_number" : "late_count";
        break;
      case Kind::kRows:
        function = is_optional ? "late_optional" : "late_rows";
        break;
      case Kind::kFree:
        function = is_tensor_value ? "late_free" : nullptr;
        break;
    }
    if (!function) {
      continue;
    }
    const auto constant = [&](const c10::IValue& value) { return graph_.insertConstant(value); };
    Value* name = constant(std::string(live.value->hasDebugName() ? live.value->debugNameBase() : "a value"));
    Value* late = torch::jit::insertGraph(graph_, *compile_graph(kLate, function),
                                          {live.value, index, rows, constant(live.rank), constant(live.dim), name})[0];
    if (late != live.value) {
      Value* from = live.value;
      from->replaceAllUsesAfterNodeWith(late->node(), late);
    }
  }
}

}  // namespace torchgraft
