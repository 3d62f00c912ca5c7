#include <torchgraft/patch/insert/compose_bottleneck.h>

#include <torchgraft/patch/graph/activation_node.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>

namespace torchgraft {

using torch::jit::Value;

namespace {

const BnConfig& config_of(const ComposedPart& part) { return std::get<PlannedBottleneck>(part.module->method).config; }

// The slot as this adapter alone needs it: without the gate of others.
Slot own_slot(const ComposedPart& part) {
  Slot slot = *part.slot;
  if (slot.gates[part.adapter] == 0) {
    slot.parameters.erase("gate_weight");
    slot.parameters.erase("gate_bias");
  }
  return slot;
}

}  // namespace

void check_composed_bottlenecks(const ComposedSite& site) {
  const std::string begin = "compose: '" + site.name + "': ";
  for (const auto& [name, part] : site.parts) {
    TORCH_CHECK(!part.slot->form.replaces_norm, begin, "'", name, "' has original_ln_after=False at ", site.place,
                ", which no composition supports yet; use it alone");
    // Its residual has the result of the attention beside it, which another composed adapter may have changed.
    TORCH_CHECK(part.slot->form.wiring != BottleneckWiring::kAfterOthers, begin, "the adapters library trained '", name,
                "' on GPT-J, where the residual at ", site.place, " has the result of the attention beside it; no ",
                "composition supports that yet; use the adapter alone");
    TORCH_CHECK(part.slot->form.wiring == site.parts.begin()->second.slot->form.wiring, begin, "'", name, "' and '",
                site.parts.begin()->first, "' take different values for the branch at ", site.place,
                ": the adapters library trained one of them on this model, where it exchanges them, and the other is ",
                "fresh, or was trained on another; take both from directories of this model");
  }
}

bool reads_normed_sum(const ComposedSite& site) {
  for (const auto& [name, part] : site.parts) {
    if (part.slot->form.input == BottleneckInput::kNormedSum) {
      return true;
    }
  }
  return false;
}

ComposedState BottleneckComposer::pre_block(const Composition& block, ComposedState state) {
  const std::string& name = first_adapter(block);
  const ComposedPart* first = find(name);
  if (!first) {
    refuse("'" + name + "' comes first in " + composition_to_string(block) +
           " and does nothing there, but the first adapter tells the adapters library how the block reads its input; "
           "put another adapter first");
  }
  return pre_forward(*first, state);
}

ComposedState BottleneckComposer::pre_forward(const ComposedPart& part, ComposedState state) {
  const BnConfig& config = config_of(part);
  if (config.is_parallel) {
    state.hidden = state.input;
    state.residual = state.input;
    state.is_branch = false;
    return state;
  }
  const auto* is_before = std::get_if<bool>(&config.residual_before_ln);
  Value* branch = state.hidden;
  Value* sum = branch;
  if (config.original_ln_before) {
    const bool is_known = state.is_branch && normed_sum_;
    const bool reads_sum = !is_known || !is_before;
    sum = reads_sum ? graph_.insert(c10::aten::add, {branch, state.input}) : branch;
    state.hidden = is_known ? normed_sum_ : bottlenecks_.normed(state_, sum);
  }
  state.residual = is_before ? (*is_before ? branch : state.hidden) : sum;
  state.is_branch = false;
  return state;
}

// Adapter.forward. The result of a parallel one has no residual.
ComposedState BottleneckComposer::single(const ComposedPart& part, ComposedState state) {
  const Inserter::Scope guard = only(part);
  Value* residual = config_of(part).is_parallel ? graph_.insert(c10::aten::zeros_like, {state.hidden}) : state.residual;
  const auto [output, gate] = bottlenecks_.bottleneck(own_slot(part), state.hidden, residual);
  if (part.slot->gates[part.adapter] > 0) {
    add_gate(part, gate);
  }
  state.hidden = output;
  state.is_branch = false;
  state.has_up = true;
  return state;
}

// The library joins bottleneck_up where the first part has it.
ComposedState BottleneckComposer::joined_rows(BlockKind block, const std::vector<ComposedState>& states) {
  for (const ComposedState& state : states) {
    if (states.front().has_up && !state.has_up) {
      refuse(std::string("a part of a ") + to_string(block) +
             " is a Split or does nothing there, which the adapters library cannot join with the first part; put it "
             "first, or give all parts the same locations and leave_out");
    }
  }
  return Composer::joined_rows(block, states);
}

ComposedState BottleneckComposer::mean(const std::vector<ComposedState>& states, const std::vector<double>& shares) {
  ComposedState result = states.front();
  std::vector<Value*> values;
  for (const ComposedState& state : states) {
    values.push_back(state.hidden);
  }
  result.hidden = sum(values, shares);
  result.is_branch = false;
  return result;
}

ComposedState BottleneckComposer::split(const Composition& block, ComposedState state) {
  check_sizes(block, state.hidden, 1, "the given input has sequence length ", "splits");
  state = pre_block(block, state);
  std::vector<Value*> parts;
  std::optional<ComposedPart> last;
  int64_t begin = 0;
  for (size_t i = 0; i < block.children.size(); ++i) {
    ComposedState slice = sliced(state, 1, begin, begin + block.sizes[i]);
    slice.last.reset();
    bool is_present = false;
    const ComposedState result = child(block, i, slice, is_present);
    if (!is_present) {
      refuse("'" + block.children[i].name + "' does nothing there, so that the adapters library drops its tokens of " +
             composition_to_string(block) + "; give all of them the same locations and leave_out");
    }
    parts.push_back(result.hidden);
    last = result.last ? result.last : last;
    begin += block.sizes[i];
  }
  state.hidden = joined(parts, 1);
  state.last = last;
  return state;
}

// The library computes it, and does not use it.
void BottleneckComposer::add_unused_gate(const ComposedPart& part, const ComposedState& state) {
  if (part.slot->gates[part.adapter] > 0) {
    const Inserter::Scope guard = only(part);
    add_gate(part, bottlenecks_.gate(*part.slot, state.hidden));
  }
}

Value* BottleneckComposer::up(const ComposedPart& part, const ComposedState& state) {
  add_unused_gate(part, state);
  const Inserter::Scope guard = only(part);
  return bottlenecks_.up(own_slot(part), state.hidden);
}

// An adapter, or a Stack of adapters.
Value* BottleneckComposer::up_of_child(const Composition& child, ComposedState state) {
  if (child.kind == BlockKind::kAdapter) {
    const ComposedPart* part = find(child.name);
    return part ? up(*part, state) : nullptr;
  }
  std::vector<const ComposedPart*> present;
  for (const Composition& node : child.children) {
    if (const ComposedPart* part = find(node.name)) {
      present.push_back(part);
    }
  }
  if (present.empty()) {
    refuse(composition_to_string(child) + " does nothing there, so that the adapters library has nothing to fuse");
  }
  for (const ComposedPart* part : present) {
    state = pre_forward(*part, state);
    if (part != present.back()) {
      state = single(*part, state);
    }
  }
  return up(*present.back(), state);
}

// query W_q + b_q times key W_k + b_k. W_k can go to the query, and W_v behind the weighted sum. All keys have b_k, so
// that it changes no softmax, unless scores are dropped.
Value* BottleneckComposer::fused(const AdapterFusion& fusion, Value* query, const std::vector<Value*>& ups) {
  const auto weight = [&](const char* name) {
    return inserter_.fusion_weight(fusion, *site_.parts.begin()->second.slot, name);
  };
  if (fusion.config.query) {
    query = graph_.insert(c10::aten::linear, {query, weight("query_weight"), weight("query_bias")});
  }
  Value* of_bias = nullptr;  // [rows, S, 1]
  if (fusion.config.key) {
    if (fusion.trainable) {
      Value* bias = graph_.insert(c10::aten::unsqueeze, {weight("key_bias"), -1});
      of_bias = graph_.insert(c10::aten::matmul, {query, bias});
    }
    query = graph_.insert(c10::aten::matmul, {query, weight("key_weight")});
  }
  Value* list = graph_.insertNode(graph_.createList(c10::TensorType::get(), ups))->output();
  Value* stacked = graph_.insert(c10::aten::stack, {list, 2});  // [rows, S, adapters, H]
  Value* scores = graph_.insert(c10::aten::matmul, {stacked, graph_.insert(c10::aten::unsqueeze, {query, -1})});
  scores = graph_.insert(c10::aten::squeeze, {scores, -1});
  scores = of_bias ? graph_.insert(c10::aten::add, {scores, of_bias}) : scores;
  const double dropout = fusion.config.dropout_prob.value_or(0.0);
  scores = fusion.trainable && dropout > 0.0 ? inserter_.dropped(scores, dropout) : scores;
  Value* shares = graph_.insert(c10::aten::softmax, {scores, -1});
  Value* sum = graph_.insert(c10::aten::matmul, {graph_.insert(c10::aten::unsqueeze, {shares, -2}), stacked});
  sum = graph_.insert(c10::aten::squeeze, {sum, -2});
  return fusion.config.value ? graph_.insert(c10::aten::linear, {sum, weight("value_weight")}) : sum;
}

std::optional<FoldedFusion> BottleneckComposer::fold(const AdapterFusion& fusion, const Composition& block,
                                                     const Slot& slot) {
  std::vector<ComposedPart> parts;
  for (const Composition& node : block.children) {
    if (node.kind != BlockKind::kAdapter) {
      return std::nullopt;
    }
    if (const ComposedPart* part = find(node.name)) {
      parts.push_back(*part);
    }
  }
  return fold_fusion(fusion, fusion.weights.at({slot.number, slot.site}), parts);
}

Value* BottleneckComposer::folded(const FoldedFusion& fusion, Value* hidden, Value* query) {
  static const char* const kSource = R"python(
def shares(inner: Tensor, scores: Tensor, adapters: int) -> Tensor:
    width = inner.size(-1)
    products = inner * scores.narrow(-1, 0, width)
    return torch.softmax(products.unflatten(-1, [adapters, -1]).sum(-1) + scores.narrow(-1, width, adapters), -1)

def weighted(inner: Tensor, shares: Tensor, adapters: int) -> Tensor:
    return (inner.unflatten(-1, [adapters, -1]) * shares.unsqueeze(-1)).flatten(-2)
)python";
  const auto linear = [&](Value* x, const at::Tensor& weight, const at::Tensor& bias) {
    return graph_.insert(c10::aten::linear, {x, inserter_.new_buffer(weight), inserter_.new_buffer(bias)});
  };
  const auto call = [&](const char* name, std::vector<Value*> arguments) {
    arguments.push_back(graph_.insertConstant(fusion.adapters));
    return torch::jit::insertGraph(graph_, *compile_graph(kSource, name), arguments)[0];
  };
  Value* down = nullptr;
  Value* scores = nullptr;
  if (hidden == query) {
    const int64_t width = fusion.down.size(0);
    Value* both = linear(hidden, at::cat({fusion.down, fusion.score}), at::cat({fusion.down_bias, fusion.score_bias}));
    down = graph_.insert(c10::aten::narrow, {both, -1, 0, width});
    scores = graph_.insert(c10::aten::narrow, {both, -1, width, fusion.score.size(0)});
  } else {
    down = linear(hidden, fusion.down, fusion.down_bias);
    scores = linear(query, fusion.score, fusion.score_bias);
  }
  Value* inner = insert_activation(graph_, down, fusion.non_linearity);
  Value* shares = call("shares", {inner, scores});
  Value* up_weight = inserter_.new_buffer(fusion.up);
  Value* result = graph_.insert(c10::aten::linear, {call("weighted", {inner, shares}), up_weight});
  Value* biases = graph_.insert(c10::aten::matmul, {shares, inserter_.new_buffer(fusion.up_bias)});
  return graph_.insert(c10::aten::add, {result, biases});
}

ComposedState BottleneckComposer::fuse(const Composition& block, ComposedState state) {
  const std::string& name = last_adapter(block);
  const ComposedPart* last = find(name);
  if (!last) {
    refuse("'" + name + "' comes last in " + composition_to_string(block) +
           " and does nothing there, but the last adapter tells the adapters library how a Fuse reads its input; "
           "put another adapter last");
  }
  const AdapterFusion* fusion = inserter_.find_fusion(fusion_name(block));
  const bool has_weights = fusion && fusion->weights.count({last->slot->number, last->slot->site}) > 0;
  if (!has_weights) {
    refuse(std::string(fusion ? "the" : "no") + " AdapterFusion layer '" + fusion_name(block) +
           (fusion ? "' has no weights there; load one that was trained with these adapters"
                   : "' is in the module; load it with load_adapter_fusion"));
  }
  Value* before = state.hidden;
  state = pre_forward(*last, state);
  const bool reads_before = !config_of(*last).is_parallel && fusion->config.query_before_ln;
  Value* query = reads_before ? before : state.hidden;
  if (const auto products = fold(*fusion, block, *last->slot)) {
    for (const Composition& node : block.children) {
      if (const ComposedPart* part = find(node.name)) {
        add_unused_gate(*part, state);
      }
    }
    state.hidden = folded(*products, state.hidden, query);
  } else {
    std::vector<Value*> ups;
    for (const Composition& node : block.children) {
      if (Value* value = up_of_child(node, state)) {
        ups.push_back(fusion->config.residual_before ? graph_.insert(c10::aten::add, {value, state.residual}) : value);
      }
    }
    state.hidden = fused(*fusion, query, ups);
  }
  if (!fusion->config.residual_before) {
    state.hidden = graph_.insert(c10::aten::add, {state.hidden, state.residual});
  }
  state.last = *last;
  state.is_branch = false;
  return state;
}

Value* BottleneckComposer::operator()(const Composition& tree, Value* branch, Value* residual) {
  ComposedState state;
  state.hidden = branch;
  state.input = residual;
  state.residual = residual;
  state.is_branch = true;
  state = compose(tree, state);
  if (!state.last) {
    refuse("the adapters library finds no last adapter in it, and cannot run it");
  }
  // post_forward; the model adds the residual and takes the norm.
  return config_of(*state.last).is_parallel ? graph_.insert(c10::aten::add, {state.hidden, branch}) : state.hidden;
}

}  // namespace torchgraft
