#include <torchgraft/patch/insert/compose_lora.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/row_functions.h>

#include <torch/csrc/jit/ir/constants.h>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;

void check_composed_loras(const ComposedSite& site, const LinearSite& linear) {
  const std::string begin = "compose: '" + site.name + "': ";
  const std::string& first = site.parts.begin()->first;
  TORCH_CHECK(!linear.is_part, begin, "the LoRA of '", first, "' is at ", site.place,
              ", a projection that is packed with others, where the adapters library has no compositions");
  TORCH_CHECK(linear.elsewhere.empty(), begin, "the LoRA of '", first, "' is at ", site.place,
              ", a projection that the model applies to relative positions, too, which all rows share; no composition "
              "supports that yet");
  for (const auto& [name, part] : site.parts) {
    const auto& lora = std::get<PlannedLoRA>(part.module->method);
    TORCH_CHECK(!lora.config.lora_bias, begin, "the LoRA of '", name,
                "' has a bias, which only LoRAs of PEFT have, and PEFT has no compositions; use it alone");
  }
}

// One vector for each row of x, so that blocks can cut and join them: [out, 1] -> [rows, 1, out].
Value* LoraComposer::of_rows(Value* vector, Value* x) {
  static const auto repeat = compile_graph(R"python(
def of_rows(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, 1, -1).expand([x.size(0), 1, vector.numel()])
)python",
                                           "of_rows");
  return torch::jit::insertGraph(graph_, *repeat, {vector, x})[0];
}

// The forward of LoRA and IA3: the gate reads the layer's input, the rest what an earlier adapter has made.
ComposedState LoraComposer::single(const ComposedPart& part, ComposedState state) {
  const Inserter::Scope guard = only(part);
  const Slot& slot = *part.slot;
  const auto& planned = std::get<PlannedLoRA>(part.module->method);
  Value* module = inserter_.slot_module(slot);
  const auto of = [&](const char* name) { return inserter_.parameter(slot, module, name); };
  Value* own_gate = pooled_gate(part, state.input);
  const auto gated = [&](Value* value) -> Value* {
    if (!own_gate) {
      return value;
    }
    Value* factor = graph_.insert(c10::aten::unsqueeze, {own_gate, -1});
    return graph_.insert(c10::aten::mul, {value, factor});
  };
  if (slot.lora == LoRAForm::kScale) {
    Value* adapter = inserter_.active();
    Value* vector = graph_.insert(c10::aten::select, {of("lora_b"), 0, adapter});  // [out, 1]
    vector = graph_.insert(c10::aten::narrow, {vector, 0, 0, planned.out_features});
    vector = graph_.insert(c10::aten::mul, {vector, graph_.insert(c10::aten::select, {of("scaling"), 0, adapter})});
    vector = of_rows(vector, state.input);
    state.tokens = state.hidden ? state.tokens : 1;
    state.hidden = gated(state.hidden ? graph_.insert(c10::aten::mul, {state.hidden, vector}) : vector);
    return state;
  }
  if (state.hidden && planned.in_features != planned.out_features) {
    refuse("a LoRA behind another reads its result, for which the adapters library needs a square weight, got " +
           std::to_string(planned.in_features) + " features in and " + std::to_string(planned.out_features) + " out");
  }
  Value* x = state.hidden ? state.hidden : state.input;
  x = slot.dropout > 0.0 ? inserter_.dropped(slot, x) : x;
  Value* zeros = graph_.insert(c10::aten::zeros_like, {state.hidden ? state.hidden : state.residual});
  Node* op = inserter_.call(
      "gated_lora",
      {NamedValue(x), NamedValue(zeros), NamedValue(of("lora_a")), NamedValue(of("lora_b")), NamedValue(of("scaling"))},
      {{"adapter_ids", inserter_.adapter_ids()}, {"adapter", inserter_.active()}});
  state.hidden = gated(op->outputs()[0]);
  return state;
}

void LoraComposer::check_are_alike(const std::vector<ComposedState>& states, const char* block) const {
  for (const ComposedState& state : states) {
    if (state.tokens != states.front().tokens) {
      refuse(std::string("the adapters library cannot join results of (IA)^3 and of a LoRA, as this ") + block +
             " does; compose adapters of one kind");
    }
  }
}

ComposedState LoraComposer::joined_rows(BlockKind block, const std::vector<ComposedState>& states) {
  check_are_alike(states, to_string(block));
  return Composer::joined_rows(block, states);
}

ComposedState LoraComposer::mean(const std::vector<ComposedState>& states, const std::vector<double>& shares) {
  check_are_alike(states, "Average");
  ComposedState result = states.front();
  std::vector<Value*> values;
  for (const ComposedState& state : states) {
    if (!state.hidden) {
      refuse("an adapter of an Average does nothing there, which the adapters library cannot run");
    }
    values.push_back(state.hidden);
  }
  result.hidden = sum(values, shares);
  return result;
}

Value* LoraComposer::operator()(const Composition& tree, Value* x, Value* base) {
  ComposedState state;
  state.input = x;
  state.residual = base;
  state = compose(tree, state);
  if (!state.last || !state.hidden) {
    refuse("the adapters library finds no last adapter in it, and cannot run it");
  }
  const Slot& slot = *state.last->slot;
  if (slot.lora == LoRAForm::kScale) {
    return graph_.insert(c10::aten::mul, {base, state.hidden});
  }
  Value* result = graph_.insert(c10::aten::add, {base, state.hidden});
  if (slot.lora == LoRAForm::kAdd) {
    return result;
  }
  const Inserter::Scope guard = only(*state.last);
  Value* module = inserter_.slot_module(slot);
  const auto of = [&](const char* name) { return inserter_.parameter(slot, module, name); };
  RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
  return rows.with_magnitude(result, of("magnitude"), of("weight_norm"), of("fixed"));
}

}  // namespace torchgraft
