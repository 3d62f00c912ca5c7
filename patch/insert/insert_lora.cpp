#include <torchgraft/patch/insert/inserter.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/row_functions.h>
#include <torchgraft/patch/module/adapter_bank.h>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

// Dropout is for what the update reads, not for what its gate reads.
std::pair<Value*, Value*> Inserter::lora_with_dropout(const Slot& slot, Value* x, Value* base, Value* adapter_ids,
                                                      Value* adapter, Value* token_mask) {
  Value* module = slot_module(slot);
  const auto of = [&](const char* name) { return parameter(slot, module, name); };
  RowFunctions rows(graph_, adapter_ids, adapter);
  Value* gate = rows.pooled(x, of("gate_weight"), of("gate_bias"),
                            token_mask ? token_mask : graph_.insertConstant(c10::IValue()));
  Node* op = call("gated_lora",
                  {NamedValue(dropped(slot, x)), NamedValue(graph_.insert(c10::aten::zeros_like, {base})),
                   NamedValue(of("lora_a")), NamedValue(of("lora_b")), NamedValue(of("scaling"))},
                  {{"adapter_ids", adapter_ids}, {"adapter", adapter}});
  Value* update = graph_.insert(c10::aten::mul, {op->outputs()[0], graph_.insert(c10::aten::unsqueeze, {gate, -1})});
  return {graph_.insert(c10::aten::add, {base, update}), gate};
}

std::pair<Value*, Value*> Inserter::lora(const Slot& slot, Value* x, Value* base, Value* adapter_ids, Value* adapter,
                                         Value* token_mask) {
  Value* module = slot_module(slot);
  std::pair<Value*, Value*> result;  // (output, gate)
  if (slot.dropout > 0.0) {
    result = lora_with_dropout(slot, x, base, adapter_ids, adapter, token_mask);
  } else if (slot.lora != LoRAForm::kScale) {
    std::vector<NamedValue> named = gate_arguments(slot, module);
    named.emplace_back("adapter_ids", adapter_ids);
    named.emplace_back("adapter", adapter);
    if (token_mask) {
      named.emplace_back("token_mask", token_mask);
    }
    Node* op = call("gated_lora",
                    {NamedValue(x), NamedValue(base), NamedValue(parameter(slot, module, "lora_a")),
                     NamedValue(parameter(slot, module, "lora_b")), NamedValue(parameter(slot, module, "scaling"))},
                    named);
    result = {op->outputs()[0], op->outputs()[1]};
  }
  if (slot.lora == LoRAForm::kAdd) {
    return result;
  }
  // Plain ATen code around or instead of the op; rows of other adapters keep the base's result.
  RowFunctions rows(graph_, adapter_ids, adapter);
  const auto of = [&](const char* name) { return parameter(slot, module, name); };
  if (slot.lora == LoRAForm::kScale) {
    result.second = rows.pooled(x, of("gate_weight"), of("gate_bias"),
                                token_mask ? token_mask : graph_.insertConstant(c10::IValue()));
    result.first = rows.scaled(base, of("lora_b"), of("scaling"), result.second);
  } else {
    result.first = rows.with_magnitude(result.first, of("magnitude"), of("weight_norm"), of("fixed"));
  }
  return {rows.choose(of("present"), result.first, base), result.second};
}

Value* Inserter::insert_lora(const Slot& slot, const LinearSite& site) {
  // Ops on a packed projection follow each other: `whole` is its result so far.
  Value* whole = projections_.try_emplace(site.node, site.node->output()).first->second;
  Node* end = marker_behind(whole->node());  // the users see the updated value
  WithInsertPoint guard(end);
  Value* base = whole;
  if (site.is_part) {
    base = graph_.insert(c10::aten::narrow, {whole, -1, site.offset, site.width});
  }
  Value* x = swapped(site.node->input(0), site.sequence_first);
  const auto [output, gate] =
      lora(slot, x, swapped(base, site.sequence_first), adapter_ids_, active_, token_mask(slot));
  Value* updated = swapped(output, site.sequence_first);
  if (site.sequence_first && !site.is_part) {
    updated = graph_.insert(c10::aten::contiguous, {updated});  // as a linear's result is: views of it must work
  }
  if (site.is_part) {
    updated = graph_.insert(c10::aten::slice_scatter, {whole, updated, -1, site.offset, site.offset + site.width, 1});
  }
  whole->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
  projections_[site.node] = updated;
  return gate;
}

// The adapter of every row, computed before anything else: for what all rows share, there can be only one.
Value* Inserter::one_adapter() {
  if (!one_adapter_) {
    static const auto body = compile_graph(R"python(
def one_adapter(adapter_ids: Optional[Tensor], active: int) -> int:
    if adapter_ids is None:
        return active
    if adapter_ids.numel() == 0:
        return active
    first = int(adapter_ids[0])
    assert bool((adapter_ids == first).all()), "torchgraft: rows of one batch cannot have different adapters in this " \
        "model: it applies a projection that has a LoRA to relative positions, which all rows share"
    return first
)python",
                                           "one_adapter");
    WithInsertPoint guard(active_->node()->next());
    one_adapter_ = torch::jit::insertGraph(graph_, *body, {adapter_ids_, active_})[0];
  }
  return one_adapter_;
}

// A linear map with the slot's weight on [1, P, features] gets the same LoRA; its gate is pooled over the P positions.
void Inserter::insert_lora_elsewhere(const Slot& slot, Node* linear) {
  Value* adapter = one_adapter();
  Node* end = marker_behind(linear);
  WithInsertPoint guard(end);
  Value* none = graph_.insertConstant(c10::IValue());
  Value* updated = lora(slot, linear->input(0), linear->output(), none, adapter, nullptr).first;
  linear->output()->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
}

}  // namespace torchgraft
