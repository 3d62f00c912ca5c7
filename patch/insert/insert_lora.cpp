#include <torchgraft/patch/insert/insert_lora.h>

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/insert/row_functions.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// Whether `value` is a constant, rearranged or repeated.
bool is_from_constant(Value* value) {
  while (is_layout(value->node()) || is_aten(value->node(), {"repeat", "expand", "slice", "narrow"})) {
    value = value->node()->input(0);
  }
  return value->node()->kind() == c10::prim::Constant;
}

// Whether `value` is, through rearrangements and scales, a factor of a product with a constant.
bool meets_constant(Value* value) {
  const auto uses = data_uses(value);
  return std::any_of(uses.begin(), uses.end(), [&](const torch::jit::Use& use) {
    if (is_aten(use.user, {"matmul", "bmm"})) {
      return is_from_constant(use.user->input(1 - use.offset));
    }
    const bool passes = is_layout(use.user) || is_aten(use.user, {"dropout", "mul", "div"}) ||
                        use.user->kind() == c10::prim::ListUnpack;
    const auto outputs = use.user->outputs();
    return passes && std::any_of(outputs.begin(), outputs.end(), meets_constant);
  });
}

}  // namespace

std::pair<Value*, Value*> LoraInserter::lora_with_dropout(const Slot& slot, Value* x, Value* base, Value* adapter_ids,
                                                          Value* adapter, Value* token_mask) {
  Value* module = inserter_.slot_module(slot);
  const auto of = [&](const char* name) { return inserter_.parameter(slot, module, name); };
  RowFunctions rows(graph_, adapter_ids, adapter);
  Value* gate = rows.pooled(x, of("gate_weight"), of("gate_bias"),
                            token_mask ? token_mask : graph_.insertConstant(c10::IValue()));
  Node* op =
      inserter_.call("gated_lora",
                     {NamedValue(inserter_.dropped(slot, x)), NamedValue(graph_.insert(c10::aten::zeros_like, {base})),
                      NamedValue(of("lora_a")), NamedValue(of("lora_b")), NamedValue(of("scaling"))},
                     {{"adapter_ids", adapter_ids}, {"adapter", adapter}});
  Value* update = graph_.insert(c10::aten::mul, {op->outputs()[0], graph_.insert(c10::aten::unsqueeze, {gate, -1})});
  return {graph_.insert(c10::aten::add, {base, update}), gate};
}

std::pair<Value*, Value*> LoraInserter::lora(const Slot& slot, Value* x, Value* base, Value* adapter_ids,
                                             Value* adapter, Value* token_mask) {
  Value* module = inserter_.slot_module(slot);
  std::pair<Value*, Value*> result;  // (output, gate)
  if (slot.dropout > 0.0) {
    result = lora_with_dropout(slot, x, base, adapter_ids, adapter, token_mask);
  } else if (slot.lora != LoRAForm::kScale) {
    std::vector<NamedValue> named = inserter_.gate_arguments(slot, module);
    named.emplace_back("adapter_ids", adapter_ids);
    named.emplace_back("adapter", adapter);
    if (token_mask) {
      named.emplace_back("token_mask", token_mask);
    }
    Node* op = inserter_.call("gated_lora",
                              {NamedValue(x), NamedValue(base), NamedValue(inserter_.parameter(slot, module, "lora_a")),
                               NamedValue(inserter_.parameter(slot, module, "lora_b")),
                               NamedValue(inserter_.parameter(slot, module, "scaling"))},
                              named);
    result = {op->outputs()[0], op->outputs()[1]};
  }
  if (slot.parameters.count("bias")) {
    RowFunctions rows(graph_, adapter_ids, adapter);
    result.first = rows.shifted(result.first, inserter_.parameter(slot, module, "bias"));
  }
  if (slot.lora == LoRAForm::kAdd) {
    return result;
  }
  // Plain ATen code around or instead of the op. Rows of other adapters keep the base's result.
  RowFunctions rows(graph_, adapter_ids, adapter);
  const auto of = [&](const char* name) { return inserter_.parameter(slot, module, name); };
  if (slot.lora == LoRAForm::kScale) {
    rows.check_ids("gated_lora", x, of("scaling"));
    result.second = rows.pooled(x, of("gate_weight"), of("gate_bias"),
                                token_mask ? token_mask : graph_.insertConstant(c10::IValue()));
    result.first = rows.scaled(base, of("lora_b"), of("scaling"), result.second);
  } else {
    result.first = rows.with_magnitude(result.first, of("magnitude"), of("weight_norm"), of("fixed"));
  }
  return {rows.choose(of("present"), result.first, base), result.second};
}

// A table's row for a token is the product with a vector that is 1 at the token's number: A of that is a column of A.
// PEFT drops out nothing here.
std::pair<Value*, Value*> LoraInserter::lookup(const Slot& slot, Value* tokens, Value* base) {
  Value* module = inserter_.slot_module(slot);
  const auto of = [&](const char* name) { return inserter_.parameter(slot, module, name); };
  RowFunctions rows(graph_, inserter_.adapter_ids(), inserter_.active());
  rows.check_ids("gated_lora", base, of("lora_a"));  // before they choose what is read
  const auto [columns, unit] = rows.looked_up(of("lora_a"), tokens);
  Node* op = inserter_.call(
      "gated_lora",
      {NamedValue(columns), NamedValue(base), NamedValue(unit), NamedValue(of("lora_b")), NamedValue(of("scaling"))},
      {{"adapter_ids", inserter_.adapter_ids()}, {"adapter", inserter_.active()}});
  return {op->outputs()[0], op->outputs()[1]};
}

Value* LoraInserter::operator()(const Slot& slot, const LinearSite& site) {
  TORCH_CHECK(!site.is_flat, "graft: no LoRA can act on the attention's output projection of layer ", slot.number,
              ", which the model applies to the rows of all sequences together; leave it out");
  if (!site.is_lookup && linear_weight(site.node)->node()->kind() == c10::prim::Constant &&
      meets_constant(site.node->output())) {
    TORCH_WARN("graft: in layer ", slot.number, " ", slot.site,
               " updates a projection whose result the frozen model multiplies by constants, as DeBERTa does by its "
               "relative positions; if the same projection has made these constants (share_att_key), its LoRA does not "
               "reach them, and results are others than before torch.jit.freeze; graft the module before it is frozen");
  }
  Value* gate = insert(slot, site);
  for (Node* other : site.elsewhere) {
    insert_elsewhere(slot, other);
  }
  return gate;
}

Value* LoraInserter::insert(const Slot& slot, const LinearSite& site) {
  Value* gate = nullptr;
  replace(site, [&](Value* x, Value* base) {
    const auto made =
        site.is_lookup ? lookup(slot, x, base)
                       : lora(slot, x, base, inserter_.adapter_ids(), inserter_.active(), inserter_.token_mask(slot));
    gate = made.second;
    return made.first;
  });
  return gate;
}

void LoraInserter::replace(const LinearSite& site, const std::function<Value*(Value* x, Value* base)>& make) {
  // Ops on a packed projection follow each other: `whole` is its result so far.
  Value* whole = projections_.try_emplace(site.node, site.node->output()).first->second;
  Node* end = inserter_.marker_behind(whole->node());  // users behind it read the updated value
  WithInsertPoint guard(end);
  Value* base = whole;
  if (site.is_part) {
    base = graph_.insert(c10::aten::narrow, {whole, -1, site.offset, site.width});
    packed_[site.node].columns = site.packed_width;
    packed_[site.node].reads.push_back(base->node());
  }
  // A vector for each row becomes one token.
  const auto as_tokens = [&](Value* value) {
    return site.is_row ? graph_.insert(c10::aten::unsqueeze, {value, 1})
                       : inserter_.swapped(value, site.sequence_first);
  };
  base = as_tokens(base);
  Value* output = make(as_tokens(site.input()), base);
  Value* updated =
      site.is_row ? graph_.insert(c10::aten::squeeze, {output, 1}) : inserter_.swapped(output, site.sequence_first);
  if (site.sequence_first && !site.is_part) {
    updated = graph_.insert(c10::aten::contiguous, {updated});  // as the linear map's result was: it may be viewed
  }
  if (site.is_part) {
    updated = graph_.insert(c10::aten::slice_scatter, {whole, updated, -1, site.offset, site.offset + site.width, 1});
    packed_[site.node].writes.push_back(updated->node());
  }
  whole->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
  projections_[site.node] = updated;
}

void LoraInserter::join_packed_parts() {
  for (const auto& [linear, parts] : packed_) {
    join_parts(graph_, parts);
  }
}

Value* LoraInserter::one_adapter() {
  if (!one_adapter_) {
    static const auto body = compile_graph(R"python(
def one_adapter(adapter_ids: Optional[Tensor], active: int) -> int:
    if adapter_ids is None:
        return active
    if adapter_ids.numel() == 0:
        return active
    first = int(adapter_ids[0])
    assert bool((adapter_ids == first).all()), "torchgraft: rows of one batch cannot have different adapters in this " \
        "model: it applies a projection that has a LoRA to relative positions, which all rows share; use one adapter " \
        "per batch"
    return first
)python",
                                           "one_adapter");
    WithInsertPoint guard(inserter_.active()->node()->next());
    one_adapter_ = torch::jit::insertGraph(graph_, *body, {inserter_.adapter_ids(), inserter_.active()})[0];
  }
  return one_adapter_;
}

void LoraInserter::insert_elsewhere(const Slot& slot, Node* linear) {
  Value* adapter = one_adapter();
  Node* end = inserter_.marker_behind(linear);
  WithInsertPoint guard(end);
  Value* none = graph_.insertConstant(c10::IValue());
  Value* updated = lora(slot, linear_input(linear), linear->output(), none, adapter, nullptr).first;
  linear->output()->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
}

}  // namespace torchgraft
