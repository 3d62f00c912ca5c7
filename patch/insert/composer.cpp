#include <torchgraft/patch/insert/composer.h>

#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/row_functions.h>

#include <torch/csrc/jit/ir/constants.h>

#include <numeric>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Value;

namespace {

constexpr const char* kComposerFunctions = R"python(
def rows_of_each(x: Tensor, channels: int) -> int:
    assert x.size(0) % channels == 0, "a Parallel of {} got {} rows".format(channels, x.size(0))
    return x.size(0) // channels

def check_size(x: Tensor, dim: int, expected: int, before: str, behind: str) -> None:
    assert x.size(dim) == expected, before + str(x.size(dim)) + behind
)python";

}  // namespace

const ComposedPart* Composer::find(const std::string& adapter) const {
  const auto found = site_.parts.find(adapter);
  return found == site_.parts.end() ? nullptr : &found->second;
}

void Composer::refuse(const std::string& reason) const {
  TORCH_CHECK(false, "compose: '", site_.name, "': ", reason, ", at ", site_.place);
}

void Composer::check_has_none(const Composition& block) const {
  for (const std::string& name : adapters_in(block)) {
    if (find(name) != nullptr) {
      refuse(std::string("the adapters library has ") + to_string(block.kind) + " for bottlenecks only, and '" + name +
             "' has another method");
    }
  }
}

ComposedState Composer::compose(const Composition& tree, const ComposedState& state) {
  switch (tree.kind) {
    case BlockKind::kStack:
      return stack(tree, state);
    case BlockKind::kAverage:
      return average(tree, state);
    case BlockKind::kBatchSplit:
      return batch_split(tree, state);
    case BlockKind::kSplit:
      return split(tree, state);
    case BlockKind::kFuse:
      return fuse(tree, state);
    case BlockKind::kParallel:
      return parallel(tree, state);
    case BlockKind::kMultiTask:
    case BlockKind::kAdapter:
      break;
  }
  TORCH_INTERNAL_ASSERT(false, "no block that runs: ", to_string(tree.kind));
}

ComposedState Composer::child(const Composition& block, size_t i, const ComposedState& state, bool& is_present) {
  const Composition& node = block.children[i];
  is_present = true;
  if (node.kind != BlockKind::kAdapter) {
    return compose(node, state);
  }
  if (const ComposedPart* part = find(node.name)) {
    ComposedState result = single(*part, state);
    result.last = *part;
    return result;
  }
  is_present = false;
  return state;
}

ComposedState Composer::stack(const Composition& block, ComposedState state) {
  for (size_t i = 0; i < block.children.size(); ++i) {
    const Composition& node = block.children[i];
    if (node.kind == BlockKind::kAdapter && find(node.name)) {
      state = pre_block(node, state);
    }
    bool is_present = false;
    state = child(block, i, state, is_present);
  }
  return state;
}

// The library multiplies by the weights and takes the mean: it divides by the number of children once more.
ComposedState Composer::average(const Composition& block, ComposedState state) {
  state = pre_block(block, state);
  std::vector<ComposedState> states;
  for (size_t i = 0; i < block.children.size(); ++i) {
    bool is_present = false;
    const ComposedState result = child(block, i, state, is_present);
    if (is_present) {
      states.push_back(result);
    }
  }
  const size_t count = block.children.size();
  const double all = std::accumulate(block.weights.begin(), block.weights.end(), 0.0);
  std::vector<double> shares;
  if (states.size() == 1) {
    shares = {all / static_cast<double>(count)};
  } else {
    if (states.size() != count) {
      refuse("of the " + std::to_string(count) + " adapters of " + composition_to_string(block) + " only " +
             std::to_string(states.size()) +
             " act, which the adapters library cannot average; give all of them the same locations and leave_out");
    }
    for (const double weight : block.weights) {
      shares.push_back(weight / static_cast<double>(count));
    }
  }
  ComposedState result = mean(states, shares);
  result.last = states.back().last;
  return result;
}

ComposedState Composer::batch_split(const Composition& block, ComposedState state) {
  check_sizes(block, state.input, 0, "the given batch has a size of ", "batch_sizes");
  state = pre_block(block, state);
  std::vector<ComposedState> states;
  int64_t begin = 0;
  for (size_t i = 0; i < block.children.size(); ++i) {
    bool is_present = false;
    ComposedState part = sliced(state, 0, begin, begin + block.sizes[i]);
    part.first_rows = block.sizes[i];
    part.split_rows = 0;
    states.push_back(child(block, i, part, is_present));
    begin += block.sizes[i];
  }
  ComposedState result = joined_rows(block.kind, states);
  result.last = states.back().last;
  result.is_branch = false;
  result.split_rows = begin;
  result.is_behind_parallel = false;
  return result;
}

// A BatchSplit into parts of one size: repeat_rows() has repeated the rows before.
ComposedState Composer::parallel(const Composition& block, ComposedState state) {
  static const auto rows_of_each = compile_graph(kComposerFunctions, "rows_of_each");
  state = pre_block(block, state);
  const auto channels = static_cast<int64_t>(block.children.size());
  Value* rows = torch::jit::insertGraph(graph_, *rows_of_each, {state.input, graph_.insertConstant(channels)})[0];
  std::vector<ComposedState> states;
  Value* begin = graph_.insertConstant(0);
  for (size_t i = 0; i < block.children.size(); ++i) {
    Value* end = graph_.insert(c10::aten::add, {begin, rows});
    ComposedState part = sliced(state, 0, begin, end);
    part.split_rows = 0;
    part.is_behind_parallel = false;
    bool is_present = false;
    states.push_back(child(block, i, part, is_present));
    begin = end;
  }
  ComposedState result = joined_rows(block.kind, states);
  result.last = states.back().last;
  result.is_branch = false;
  result.split_rows = 0;
  result.is_behind_parallel = channels > 1;
  return result;
}

void Composer::check_sizes(const Composition& block, Value* x, int64_t dim, const char* what, const char* field) {
  static const auto check = compile_graph(kComposerFunctions, "check_size");
  const int64_t expected = std::accumulate(block.sizes.begin(), block.sizes.end(), int64_t{0});
  const std::string before = "'" + site_.name + "': " + what;
  const std::string behind = c10::str(kOtherSizes, field, " [", c10::Join(", ", block.sizes), "]");
  torch::jit::insertGraph(graph_, *check,
                          {x, graph_.insertConstant(dim), graph_.insertConstant(expected),
                           graph_.insertConstant(before), graph_.insertConstant(behind)});
}

ComposedState Composer::pre_block(const Composition&, ComposedState state) { return state; }

ComposedState Composer::mean(const std::vector<ComposedState>&, const std::vector<double>&) {
  refuse("the adapters library has no Average for this method");
}

ComposedState Composer::split(const Composition& block, ComposedState state) {
  check_has_none(block);
  return state;
}

ComposedState Composer::fuse(const Composition& block, ComposedState state) {
  check_has_none(block);
  return state;
}

ComposedState Composer::joined_rows(BlockKind block, const std::vector<ComposedState>& states) {
  ComposedState result = states.front();
  const auto of = [&](Value* ComposedState::* member) {
    std::vector<Value*> values;
    for (const ComposedState& state : states) {
      if (!(state.*member) != !(states.front().*member)) {
        refuse(std::string("an adapter of a ") + to_string(block) +
               " does nothing there, which the adapters library cannot run");
      }
      values.push_back(state.*member);
    }
    result.*member = values.front() ? joined(values, 0) : nullptr;
  };
  of(&ComposedState::hidden);
  of(&ComposedState::input);
  of(&ComposedState::residual);
  return result;
}

ComposedState Composer::sliced(ComposedState state, int64_t dim, NamedValue begin, NamedValue end) {
  const auto slice = [&](Value* value) -> Value* {
    return value ? graph_.insert(c10::aten::slice, {value, dim, begin, end, 1}) : nullptr;
  };
  state.hidden = slice(state.hidden);
  state.input = slice(state.input);
  state.residual = slice(state.residual);
  state.is_branch = false;
  return state;
}

Inserter::Scope Composer::only(const ComposedPart& part) {
  return inserter_.one_adapter(part.row ? part.row : graph_.insertConstant(static_cast<int64_t>(part.adapter)));
}

Value* Composer::pooled_gate(const ComposedPart& part, Value* x) {
  const int64_t gates = part.slot->gates[part.adapter];
  if (gates == 0) {
    return nullptr;
  }
  Value* module = inserter_.slot_module(*part.slot);
  const auto of = [&](const char* name) { return inserter_.parameter(*part.slot, module, name); };
  RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
  Value* gate = rows.pooled(x, of("gate_weight"), of("gate_bias"), graph_.insertConstant(c10::IValue()));
  gate = graph_.insert(c10::aten::narrow, {gate, 1, 0, gates});
  add_gate(part, gate);
  return gate;
}

Value* Composer::sum(const std::vector<Value*>& values, const std::vector<double>& shares) {
  Value* result = nullptr;
  for (size_t i = 0; i < values.size(); ++i) {
    Value* part = graph_.insert(c10::aten::mul, {values[i], shares[i]});
    result = result ? graph_.insert(c10::aten::add, {result, part}) : part;
  }
  return result;
}

Value* Composer::joined(const std::vector<Value*>& values, int64_t dim) {
  Value* list = graph_.insertNode(graph_.createList(c10::TensorType::get(), values))->output();
  return graph_.insert(c10::aten::cat, {list, dim});
}

}  // namespace torchgraft
