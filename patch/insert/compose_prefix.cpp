#include <torchgraft/patch/insert/compose_prefix.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/ir/constants.h>

namespace torchgraft {

using torch::jit::Value;

ComposedState PrefixComposer::single(const ComposedPart& part, ComposedState state) {
  const Inserter::Scope guard = only(part);
  const Slot& slot = *part.slot;
  const int64_t length = std::get<PlannedPrefix>(part.module->method).config.prefix_length;
  Value* module = inserter_.slot_module(slot);
  const auto own = [&](const char* name) {
    Value* row = graph_.insert(c10::aten::narrow, {inserter_.parameter(slot, module, name), 0, inserter_.active(), 1});
    return graph_.insert(c10::aten::narrow, {row, 2, 0, length});
  };
  Value* key = own("prefix_key");
  Value* value = own("prefix_value");
  Value* gate = pooled_gate(part, state.input);
  check_behind_split(state, gate != nullptr);
  if (gate) {
    const auto scaled = [&](Value* prefix, int64_t column) {
      Value* factor = graph_.insert(c10::aten::narrow, {gate, 1, column, 1});
      factor = graph_.insert(c10::aten::view, {factor, std::vector<int64_t>{-1, 1, 1, 1}});
      return graph_.insert(c10::aten::mul, {prefix, factor});
    };
    key = scaled(key, 0);
    value = scaled(value, slot.gates[part.adapter] - 1);
  } else {
    // One for each row, so that prefixes with and without gates can be joined.
    Value* count = graph_.insert(c10::aten::size, {state.input, 0});
    static const auto repeat = compile_graph(R"python(
def of_rows(prefix: Tensor, rows: int) -> Tensor:
    return prefix.expand([rows, prefix.size(1), prefix.size(2), prefix.size(3)])
)python",
                                             "of_rows");
    key = torch::jit::insertGraph(graph_, *repeat, {key, count})[0];
    value = torch::jit::insertGraph(graph_, *repeat, {value, count})[0];
  }
  state.tokens += length;
  state.hidden = state.hidden ? joined({key, state.hidden}, 2) : key;
  state.residual = state.residual ? joined({value, state.residual}, 2) : value;
  return state;
}

// The library cuts a prefix behind a BatchSplit as it has cut the first part, and repeats it. A gate has all rows.
void PrefixComposer::check_behind_split(const ComposedState& state, bool has_gate) const {
  if (state.is_behind_parallel && has_gate) {
    refuse(
        "a prefix with a gate stands behind a Parallel, where the adapters library cuts it to the rows of the "
        "first child and cannot run it; put it into each child, as Parallel(Stack(a, c), Stack(b, c))");
  }
  if (state.split_rows == 0) {
    return;
  }
  const int64_t first = state.first_rows;
  const bool fits = has_gate ? first == 1 || first == state.split_rows : first > 0 && state.split_rows % first == 0;
  if (!fits) {
    refuse("a prefix stands behind a BatchSplit, where the adapters library cuts it to the " + std::to_string(first) +
           " of " + std::to_string(state.split_rows) +
           " rows of the first part and cannot run it; put it into each part, as Stack(a, b)");
  }
}

// The library pads to the longest prefix, and lets rows see what it pads with.
ComposedState PrefixComposer::joined_rows(BlockKind block, const std::vector<ComposedState>& states) {
  for (const ComposedState& state : states) {
    if (state.tokens != states.front().tokens) {
      refuse(std::string("the adapters of a ") + to_string(block) +
             " have prefixes of different lengths, which the adapters library fills up with keys that rows see; give "
             "them one prefix_length");
    }
  }
  return Composer::joined_rows(block, states);
}

std::pair<Value*, Value*> PrefixComposer::operator()(const Composition& tree, Value* x) {
  ComposedState state;
  state.input = x;
  state = compose(tree, state);
  if (!state.hidden) {
    refuse("no prefix is left there");
  }
  return {state.hidden, state.residual};
}

}  // namespace torchgraft
