#include <torchgraft/patch/insert/insert_bottleneck.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/graph/hoist.h>
#include <torchgraft/patch/insert/row_functions.h>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

Value* BottleneckInserter::sum(ResidualState& state) {
  if (!state.sum) {
    state.sum = graph_.insert(c10::aten::add, {state.branch, state.site.residual});
  }
  return state.sum;
}

Value* BottleneckInserter::normed_sum(ResidualState& state) {
  if (!state.normed_sum) {
    state.normed_sum = normed(state, sum(state));
  }
  return state.normed_sum;
}

Value* BottleneckInserter::normed(ResidualState& state, Value* x) {
  if (!state.site.norm) {
    return x;
  }
  for (size_t i = 1; i < state.site.norm->inputs().size(); ++i) {
    TORCH_INTERNAL_ASSERT(Hoist::move(state.site.norm->input(i), state.site.add),
                          "a norm's weights depend on its input");
  }
  Node* norm = graph_.insertNode(graph_.createClone(state.site.norm, [](Value* v) { return v; }));
  norm->replaceInput(0, x);
  return norm->output();
}

Node* BottleneckInserter::call_bottleneck(const Slot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named) {
  Value* module = inserter_.slot_module(slot);
  return inserter_.call(
      "gated_bottleneck",
      {NamedValue(x), NamedValue(residual), NamedValue(inserter_.parameter(slot, module, "down_weight")),
       NamedValue(inserter_.parameter(slot, module, "down_bias")),
       NamedValue(inserter_.parameter(slot, module, "up_weight")),
       NamedValue(inserter_.parameter(slot, module, "up_bias")),
       NamedValue(inserter_.parameter(slot, module, "scaling")),
       NamedValue(graph_.insertConstant(slot.form.non_linearity))},
      named);
}

// The op adds the residual itself, unless a norm or dropout comes between. The op pools its gate from the input of its
// down projection. When a norm comes before that projection, the gate is pooled outside the op, from x.
std::pair<Value*, Value*> BottleneckInserter::bottleneck(const Slot& slot, Value* x, Value* residual) {
  Value* module = inserter_.slot_module(slot);
  const BottleneckForm& form = slot.form;
  if (!form.norm_before && !form.norm_after && slot.dropout == 0.0 && slot.stochastic_depth == 0.0) {
    Node* op = call_bottleneck(slot, x, residual, inserter_.common_arguments(slot, module));
    return {op->outputs()[0], op->outputs()[1]};
  }
  RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
  const auto normed = [&](Value* value, const std::string& name) {
    return rows.normed(value, inserter_.parameter(slot, module, name + "_weight"),
                       inserter_.parameter(slot, module, name + "_bias"));
  };
  if (form.norm_before) {  // reads the ids before the op does
    rows.check_ids("gated_bottleneck", x, inserter_.parameter(slot, module, "scaling"));
  }
  const bool gate_is_apart = form.norm_before && slot.parameters.count("gate_weight") > 0;
  std::vector<NamedValue> named = {{"adapter_ids", inserter_.adapter_ids()}, {"adapter", inserter_.active()}};
  Node* op =
      call_bottleneck(slot, form.norm_before ? normed(x, "norm_before") : x, graph_.insert(c10::aten::zeros_like, {x}),
                      gate_is_apart ? named : inserter_.common_arguments(slot, module));
  Value* output = op->outputs()[0];
  Value* gate = op->outputs()[1];
  if (gate_is_apart) {
    Value* mask = inserter_.token_mask(slot);
    gate =
        rows.pooled(x, inserter_.parameter(slot, module, "gate_weight"), inserter_.parameter(slot, module, "gate_bias"),
                    mask ? mask : graph_.insertConstant(c10::IValue()));
    output = graph_.insert(c10::aten::mul, {output, graph_.insert(c10::aten::unsqueeze, {gate, -1})});
  }
  output = slot.stochastic_depth > 0.0 ? inserter_.rows_dropped(slot, output) : output;
  output = slot.dropout > 0.0 ? inserter_.dropped(slot, output) : output;
  if (form.residual_in_norm) {
    return {normed(graph_.insert(c10::aten::add, {output, residual}), "norm_after"), gate};
  }
  output = form.norm_after ? normed(output, "norm_after") : output;
  return {graph_.insert(c10::aten::add, {output, residual}), gate};
}

Value* BottleneckInserter::up(const Slot& slot, Value* x) {
  Value* module = inserter_.slot_module(slot);
  Value* zeros = graph_.insert(c10::aten::zeros_like, {x});
  if (slot.form.norm_before) {
    x = RowFunctions(graph_, inserter_.adapter_ids(), inserter_.active())
            .normed(x, inserter_.parameter(slot, module, "norm_before_weight"),
                    inserter_.parameter(slot, module, "norm_before_bias"));
  }
  return call_bottleneck(slot, x, zeros, {{"adapter_ids", inserter_.adapter_ids()}, {"adapter", inserter_.active()}})
      ->outputs()[0];
}

Value* BottleneckInserter::gate(const Slot& slot, Value* x) {
  Value* module = inserter_.slot_module(slot);
  return RowFunctions(graph_, inserter_.adapter_ids(), inserter_.active())
      .pooled(x, inserter_.parameter(slot, module, "gate_weight"), inserter_.parameter(slot, module, "gate_bias"),
              graph_.insertConstant(c10::IValue()));
}

void BottleneckInserter::replace_stream(ResidualState& state, const Slot& slot, Value* output) {
  const ResidualSite& site = state.site;
  TORCH_CHECK(site.sum == site.add, "graft: original_ln_after=False has no meaning for ", slot.location, " of layer ",
              slot.number,
              ", whose attention and feed-forward block are parallel: the model adds their results "
              "together; use original_ln_after=True");
  if (!state.stream) {
    state.stream = (site.norm ? site.norm : site.sum)->output();
  }
  Node* end = inserter_.marker_behind(state.stream->node());
  WithInsertPoint guard(end);
  RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
  Value* present = inserter_.parameter(slot, inserter_.slot_module(slot), "present");
  Value* chosen = rows.choose(present, output, inserter_.swapped(state.stream, site.sequence_first));
  chosen = inserter_.swapped(chosen, site.sequence_first);
  state.stream->replaceAllUsesAfterNodeWith(end, chosen);
  end->destroy();
  inserter_.replace_stream((site.norm ? site.norm : site.sum)->output(), chosen);
  state.stream = chosen;
}

ResidualSite BottleneckInserter::wired(const Slot& slot, ResidualSite site) {
  const size_t other = 1 - site.branch_operand;
  if (slot.form.wiring == BottleneckWiring::kExchanged) {
    TORCH_CHECK(site.sum == site.add, "graft: the bottleneck ", slot.location, " of layer ", slot.number,
                " was trained on ALBERT, where the adapters library exchanges the branch and the residual; this model "
                "adds a parallel block in between, so that the two cannot be exchanged; remove \"model_type\" from the "
                "adapter's adapter_config.json to accept the difference");
    site.residual = site.branch();
    site.branch_operand = other;
  } else if (slot.form.wiring == BottleneckWiring::kAfterOthers) {
    WithInsertPoint guard(site.add);
    Value* others = site.add->input(other);
    // The stream is a part of `others`, or comes in at a later add.
    site.residual = site.sum == site.add ? others : graph_.insert(c10::aten::add, {others, site.residual});
  }
  return site;
}

ResidualState& BottleneckInserter::state(const Slot& slot, const ResidualSite& found) {
  ResidualSite present = found;
  present.residual = inserter_.present_stream(found.residual);
  const ResidualSite site = wired(slot, present);
  return residuals_.try_emplace({site.add, site.branch_operand, slot.form.wiring}, ResidualState{site, site.branch()})
      .first->second;
}

Value* BottleneckInserter::operator()(const Slot& slot, const ResidualSite& found) {
  ResidualState& state = this->state(slot, found);
  const ResidualSite& site = state.site;
  TORCH_CHECK(site.norm || slot.form.residual != BottleneckResidual::kSum,
              "graft: residual_before_ln=\"post_add\" has no meaning for ", slot.location, " of layer ", slot.number,
              ", which has no norm behind its residual add; use residual_before_ln=False");
  WithInsertPoint guard(site.add);
  Value* x = slot.form.input == BottleneckInput::kNormedSum  ? normed_sum(state)
             : slot.form.input == BottleneckInput::kResidual ? state.site.residual
                                                             : state.branch;
  Value* residual = slot.form.residual == BottleneckResidual::kNormedSum ? normed_sum(state)
                    : slot.form.residual == BottleneckResidual::kSum     ? sum(state)
                                                                         : site.branch();
  const auto [output, gate] =
      bottleneck(slot, inserter_.swapped(x, site.sequence_first), inserter_.swapped(residual, site.sequence_first));
  if (slot.form.replaces_norm) {
    replace_stream(state, slot, output);
    return gate;
  }
  Value* updated = output;
  if (!slot.form.is_plain()) {
    RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
    updated = rows.choose(inserter_.parameter(slot, inserter_.slot_module(slot), "present"), output,
                          inserter_.swapped(site.branch(), site.sequence_first));
  }
  site.add->replaceInput(site.branch_operand, inserter_.swapped(updated, site.sequence_first));
  return gate;
}

}  // namespace torchgraft
