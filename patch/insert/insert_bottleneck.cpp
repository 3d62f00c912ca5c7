#include <torchgraft/patch/insert/inserter.h>

#include <torchgraft/patch/graph/hoist.h>
#include <torchgraft/patch/insert/row_functions.h>
#include <torchgraft/patch/module/adapter_bank.h>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

Value* Inserter::sum(ResidualState& state) {
  if (!state.sum) {
    state.sum = graph_.insert(c10::aten::add, {state.branch, state.site.residual});
  }
  return state.sum;
}

// What original_ln_before feeds its adapter: the sum that the model makes, and the norm of it when the norm comes
// after.
Value* Inserter::normed_sum(ResidualState& state) {
  if (state.normed_sum) {
    return state.normed_sum;
  }
  const auto same = [](Value* v) { return v; };
  state.normed_sum = sum(state);
  if (state.site.norm) {
    for (size_t i = 1; i < state.site.norm->inputs().size(); ++i) {
      TORCH_INTERNAL_ASSERT(Hoist::move(state.site.norm->input(i), state.site.add),
                            "a norm's weights depend on its input");
    }
    Node* norm = graph_.insertNode(graph_.createClone(state.site.norm, same));
    norm->replaceInput(0, state.normed_sum);
    state.normed_sum = norm->output();
  }
  return state.normed_sum;
}

Node* Inserter::call_bottleneck(const Slot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named) {
  Value* module = slot_module(slot);
  return call("gated_bottleneck",
              {NamedValue(x), NamedValue(residual), NamedValue(parameter(slot, module, "down_weight")),
               NamedValue(parameter(slot, module, "down_bias")), NamedValue(parameter(slot, module, "up_weight")),
               NamedValue(parameter(slot, module, "up_bias")), NamedValue(parameter(slot, module, "scaling")),
               NamedValue(graph_.insertConstant(slot.form.non_linearity))},
              named);
}

// The op adds the residual itself, unless a norm or dropout comes between. Its gate reads what its down projection
// reads, unless a norm comes before that: then the gate is pooled beside the op.
std::pair<Value*, Value*> Inserter::bottleneck(const Slot& slot, Value* x, Value* residual) {
  Value* module = slot_module(slot);
  const BottleneckForm& form = slot.form;
  if (!form.norm_before && !form.norm_after && slot.dropout == 0.0) {
    Node* op = call_bottleneck(slot, x, residual, common_arguments(slot, module));
    return {op->outputs()[0], op->outputs()[1]};
  }
  RowFunctions rows(graph_, adapter_ids_, active_);
  const auto normed = [&](Value* value, const std::string& name) {
    return rows.normed(value, parameter(slot, module, name + "_weight"), parameter(slot, module, name + "_bias"));
  };
  const bool gate_is_apart = form.norm_before && slot.parameters.count("gate_weight") > 0;
  std::vector<NamedValue> named = {{"adapter_ids", adapter_ids_}, {"adapter", active_}};
  Node* op =
      call_bottleneck(slot, form.norm_before ? normed(x, "norm_before") : x, graph_.insert(c10::aten::zeros_like, {x}),
                      gate_is_apart ? named : common_arguments(slot, module));
  Value* output = op->outputs()[0];
  Value* gate = op->outputs()[1];
  if (gate_is_apart) {
    Value* mask = token_mask(slot);
    gate = rows.pooled(x, parameter(slot, module, "gate_weight"), parameter(slot, module, "gate_bias"),
                       mask ? mask : graph_.insertConstant(c10::IValue()));
    output = graph_.insert(c10::aten::mul, {output, graph_.insert(c10::aten::unsqueeze, {gate, -1})});
  }
  output = slot.dropout > 0.0 ? dropped(slot, output) : output;
  if (form.residual_in_norm) {
    return {normed(graph_.insert(c10::aten::add, {output, residual}), "norm_after"), gate};
  }
  output = form.norm_after ? normed(output, "norm_after") : output;
  return {graph_.insert(c10::aten::add, {output, residual}), gate};
}

// Without original_ln_after the adapter has the last word: neither residual nor norm comes behind it.
void Inserter::replace_stream(ResidualState& state, const Slot& slot, Value* output) {
  const ResidualSite& site = state.site;
  TORCH_CHECK(site.sum == site.add, "graft: original_ln_after=False has no meaning for ", slot.location, " of layer ",
              slot.number, ", whose attention and feed-forward block are parallel: their results are added together");
  if (!state.stream) {
    state.stream = (site.norm ? site.norm : site.sum)->output();
  }
  Node* end = marker_behind(state.stream->node());
  WithInsertPoint guard(end);
  RowFunctions rows(graph_, adapter_ids_, active_);
  Value* present = parameter(slot, slot_module(slot), "present");
  Value* chosen = rows.choose(present, output, swapped(state.stream, site.sequence_first));
  chosen = swapped(chosen, site.sequence_first);
  state.stream->replaceAllUsesAfterNodeWith(end, chosen);
  end->destroy();
  streams_[(site.norm ? site.norm : site.sum)->output()] = chosen;
  state.stream = chosen;
}

// branch + residual becomes op(branch) + residual.
Value* Inserter::insert_bottleneck(const Slot& slot, const ResidualSite& site) {
  ResidualState& state =
      residuals_.try_emplace({site.add, site.branch_operand}, ResidualState{site, site.branch()}).first->second;
  if (const auto replaced = streams_.find(state.site.residual); replaced != streams_.end()) {
    state.site.residual = replaced->second;
  }
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
  const auto [output, gate] = bottleneck(slot, swapped(x, site.sequence_first), swapped(residual, site.sequence_first));
  if (slot.form.replaces_norm) {
    replace_stream(state, slot, output);
    return gate;
  }
  Value* updated = output;
  if (!slot.form.is_plain()) {
    RowFunctions rows(graph_, adapter_ids_, active_);
    updated =
        rows.choose(parameter(slot, slot_module(slot), "present"), output, swapped(site.branch(), site.sequence_first));
  }
  site.add->replaceInput(site.branch_operand, swapped(updated, site.sequence_first));
  return gate;
}

}  // namespace torchgraft
