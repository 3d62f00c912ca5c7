#include <torchgraft/patch/insert/insert_compositions.h>

#include <torchgraft/config/composition_tasks.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/insert/compose_bottleneck.h>
#include <torchgraft/patch/insert/compose_lora.h>
#include <torchgraft/patch/insert/compose_prefix.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <utility>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// 4 is torch.int64: TorchScript that is compiled in C++ has no name for it.
constexpr const char* kCompositionRows = R"python(
def composition_rows(adapter_ids: Optional[Tensor], active: int, id: int) -> Tuple[int, Tensor]:
    if adapter_ids is None:
        return int(active == id), torch.zeros([0], dtype=4)
    else:
        rows = adapter_ids.eq(id).nonzero().view(-1)
        uses = 2
        if rows.numel() == 0:
            uses = 0
        elif rows.numel() == adapter_ids.numel():
            uses = 1
        return uses, rows

def refuse_rows(adapter_ids: Optional[Tensor], active: int, id: int, message: str) -> None:
    if adapter_ids is None:
        assert active != id, message
    else:
        assert not bool(adapter_ids.eq(id).any()), message

def part_row(parts: List[List[int]], uses: int, composition: int, part: int) -> int:
    if uses > 0:
        return parts[composition][part]
    return 0

def taken(value: Tensor, uses: int, rows: Tensor) -> Tensor:
    if uses == 1:
        return value
    return value.index_select(0, rows)

def taken_mask(mask: Optional[Tensor], batch: int, uses: int, rows: Tensor) -> Optional[Tensor]:
    if mask is not None:
        if uses == 2 and mask.dim() == 4 and batch > 1 and mask.size(0) == batch:
            return mask.index_select(0, rows)
        return mask
    return None

def put(whole: Tensor, part: Tensor, uses: int, rows: Tensor) -> Tensor:
    if uses == 1:
        return part.to(whole.dtype)
    return whole.index_copy(0, rows, part.to(whole.dtype))

def no_gate(whole: Tensor) -> Tensor:
    return torch.zeros([0, 1], dtype=whole.dtype, device=whole.device)

def own_ids(prefix: Tensor) -> Tuple[Tensor, Tensor]:
    rows = prefix.size(0)
    return torch.arange(rows, device=prefix.device), torch.full([rows], prefix.size(2), dtype=4, device=prefix.device)
)python";

std::vector<Value*> call_rows(torch::jit::Graph& graph, const char* function, std::vector<Value*> arguments) {
  return torch::jit::insertGraph(graph, *compile_graph(kCompositionRows, function), arguments);
}

// ReFT and invertible adapters act in Inserter::first_of_each().
bool is_composed(const std::string& site) {
  return site != "output_reft" && site != "inv_adapter" && site != "prompt_tuning";
}

}  // namespace

CompositionInserter::Rows CompositionInserter::rows_of(size_t composition) {
  WithInsertPoint guard(inserter_.active()->node()->next());
  Value* id = graph_.insertConstant(inserter_.first_composition_id() + static_cast<int64_t>(composition));
  Value* pair = call_rows(graph_, "composition_rows", {inserter_.all_adapter_ids(), inserter_.all_active(), id})[0];
  Node* unpack = graph_.insertNode(graph_.createTupleUnpack(pair));
  Value* has_any = graph_.insert(c10::aten::gt, {unpack->outputs()[0], 0});
  Rows rows{unpack->outputs()[0], unpack->outputs()[1], has_any};
  if (Value* parts = inserter_.composition_parts()) {
    for (size_t i = 0; i < adapters_in(inserter_.compositions()[composition].tree).size(); ++i) {
      Value* at = graph_.insertConstant(static_cast<int64_t>(composition));
      Value* part = graph_.insertConstant(static_cast<int64_t>(i));
      rows.parts.push_back(call_rows(graph_, "part_row", {parts, rows.uses, at, part})[0]);
    }
  }
  return rows;
}

void CompositionInserter::refuse_rows_of(size_t composition) {
  const NamedComposition& held = inserter_.compositions()[composition];
  const std::vector<int64_t> ids = ids_of_tasks(held.tree, names_of(adapters_), inserter_.compositions(), "compose");
  const std::vector<Composition> tasks = tasks_of(held.tree);
  std::string message = "forward: '" + held.name + "', " + composition_to_string(held.tree) +
                        ", needs the task of each row; give adapter_ids, with";
  for (size_t i = 0; i < ids.size(); ++i) {
    message += (i == 0 ? " " : ", ") + std::to_string(ids[i]) + " for ";
    message += tasks[i].kind == BlockKind::kAdapter ? "'" + tasks[i].name + "'" : composition_to_string(tasks[i]);
  }
  WithInsertPoint guard(inserter_.active()->node()->next());
  Value* id = graph_.insertConstant(inserter_.first_composition_id() + static_cast<int64_t>(composition));
  call_rows(graph_, "refuse_rows",
            {inserter_.all_adapter_ids(), inserter_.all_active(), id, graph_.insertConstant(message)});
}

ComposedSite CompositionInserter::site_of(const NamedComposition& composition, const Rows& rows, size_t layer,
                                          const std::string& site, const std::vector<const Slot*>& slots) const {
  ComposedSite result{composition.name, site + " of layer " + std::to_string(slots.front()->number), {}};
  const std::vector<std::string> names = adapters_in(composition.tree);
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string& name = names[i];
    const size_t index = find_adapter(adapters_, name, "compose");
    const Adapter& adapter = adapters_[index];
    for (const Slot* slot : slots) {
      for (size_t m = 0; m < adapter.plan.size(); ++m) {
        const PlannedModule& module = adapter.plan[m];
        if (module.layer == slot->layer && module.site == site && slot_name(adapter, module) == slot->name) {
          result.parts.emplace(name, ComposedPart{index, slot, &module, &adapter.weights[m], adapter.trainable,
                                                  rows.parts.empty() ? nullptr : rows.parts[i], rows.first_key + i});
        }
      }
    }
  }
  return result;
}

void CompositionInserter::check_site(const ComposedSite& site) const {
  for (const auto& [name, part] : site.parts) {
    TORCH_CHECK(part.slot->gates[part.adapter] == 0 || !pools_unpadded(adapters_[part.adapter].config), "compose: '",
                site.name, "': '", name, "' has gates that are means over real tokens only (gate_pooling=\"unpadded\")",
                ", which no composition supports yet; use gate_pooling=\"all\", as the adapters library does");
  }
}

void CompositionInserter::operator()(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs) {
  std::vector<std::pair<std::pair<size_t, std::string>, std::vector<const Slot*>>> sites;  // in execution order
  for (const SlotRun& run : runs) {
    if (!is_composed(slots[run.slot].site)) {
      continue;
    }
    const std::pair<size_t, std::string> key{run.layer, slots[run.slot].site};
    auto found = std::find_if(sites.begin(), sites.end(), [&](const auto& site) { return site.first == key; });
    if (found == sites.end()) {
      found = sites.emplace(sites.end(), key, std::vector<const Slot*>());
    }
    found->second.push_back(&slots[run.slot]);
  }
  const std::vector<NamedComposition>& compositions = inserter_.compositions();
  std::vector<Rows> rows;
  size_t keys = 0;
  for (size_t i = 0; i < compositions.size(); ++i) {
    check_parts(compositions[i], adapters_, "compose");
    if (has_multi_task(compositions[i].tree)) {
      refuse_rows_of(i);
      rows.emplace_back();
    } else {
      rows.push_back(rows_of(i));
    }
    rows.back().first_key = keys;
    keys += adapters_in(compositions[i].tree).size();
  }
  for (const auto& [key, own] : sites) {
    for (size_t i = 0; i < compositions.size(); ++i) {
      const ComposedSite site = site_of(compositions[i], rows[i], key.first, key.second, own);
      if (!site.parts.empty()) {
        check_site(site);
        inserter_.enter(*site.parts.begin()->second.slot, key.first);
        insert(compositions[i], rows[i], site);  // of a MultiTask: checks the site
      }
    }
  }
}

void CompositionInserter::insert(const NamedComposition& composition, const Rows& rows, const ComposedSite& site) {
  const LayerSites& layer = inserter_.layer_sites();
  const std::string& name = site.parts.begin()->second.slot->site;
  if (const LinearSite* linear = lora_site(layer, name)) {
    TORCH_CHECK(!linear->is_lookup, "compose: '", composition.name, "' uses '", site.parts.begin()->first,
                "', whose LoRA on an embedding takes no part in compositions");
    if (has_multi_task(composition.tree)) {
      check_composed_loras(site, *linear);
      return;
    }
    insert_lora(composition, rows, site, *linear);
  } else if (name == "mh_adapter" || name == "cross_adapter") {
    insert_bottleneck(composition, rows, site, layer.attention_residual.value());
  } else if (name == "output_adapter") {
    insert_bottleneck(composition, rows, site, layer.ffn_residual.value());
  } else {
    TORCH_INTERNAL_ASSERT(name.ends_with("_prefix"), name, " is no site that compositions know");
    insert_prefix(composition, rows, site);
  }
}

Value* CompositionInserter::taken(Value* value, const Rows& rows) {
  return call_rows(graph_, "taken", {value, rows.uses, rows.rows})[0];
}

Value* CompositionInserter::at_rows(Value* whole, const Rows& rows, const ComposedSite& site,
                                    const std::function<Evaluated()>& evaluate) {
  Node* branch = graph_.insertNode(graph_.create(c10::prim::If, {rows.has_any}, 1));
  branch->output()->setType(whole->type());
  Evaluated evaluated;
  {
    WithInsertPoint guard(branch->addBlock());
    evaluated = evaluate();
    branch->blocks()[0]->registerOutput(call_rows(graph_, "put", {whole, evaluated.result, rows.uses, rows.rows})[0]);
    for (const Composer::Gate& gate : evaluated.gates) {
      branch->blocks()[0]->registerOutput(gate.value);
    }
  }
  WithInsertPoint guard(branch->addBlock());
  branch->blocks()[1]->registerOutput(whole);
  for (const Composer::Gate& gate : evaluated.gates) {
    branch->blocks()[1]->registerOutput(call_rows(graph_, "no_gate", {whole})[0]);
    gates_.push_back(branch->addOutput()->setType(c10::TensorType::get()));
    described_gates_.push_back({gate.part.slot->number, gate.part.slot->location, gate.part.key});
  }
  return branch->outputs()[0];
}

void CompositionInserter::insert_lora(const NamedComposition& composition, const Rows& rows, const ComposedSite& site,
                                      const LinearSite& linear) {
  check_composed_loras(site, linear);
  loras_.replace(linear, [&](Value* x, Value* base) {
    return at_rows(base, rows, site, [&] {
      LoraComposer composer(inserter_, site);
      Value* result = composer(composition.tree, taken(x, rows), taken(base, rows));
      return Evaluated{result, composer.gates()};
    });
  });
}

void CompositionInserter::insert_bottleneck(const NamedComposition& composition, const Rows& rows,
                                            const ComposedSite& site, const ResidualSite& residual) {
  check_composed_bottlenecks(site);
  ResidualState& state = bottlenecks_.state(*site.parts.begin()->second.slot, residual);
  const bool is_swapped = state.site.sequence_first;
  WithInsertPoint guard(state.site.add);
  Value* normed = reads_normed_sum(site) ? bottlenecks_.normed_sum(state) : nullptr;
  normed = normed ? inserter_.swapped(normed, is_swapped) : nullptr;
  Value* branch = inserter_.swapped(state.site.branch(), is_swapped);
  Value* stream = inserter_.swapped(state.site.residual, is_swapped);
  Value* updated = at_rows(branch, rows, site, [&] {
    BottleneckComposer composer(inserter_, site, bottlenecks_, state, normed ? taken(normed, rows) : nullptr);
    Value* result = composer(composition.tree, taken(branch, rows), taken(stream, rows));
    return Evaluated{result, composer.gates()};
  });
  state.site.add->replaceInput(state.site.branch_operand, inserter_.swapped(updated, is_swapped));
}

void CompositionInserter::insert_prefix(const NamedComposition& composition, const Rows& rows,
                                        const ComposedSite& site) {
  Value* whole = attentions_.at(inserter_.layer());
  Node* end = inserter_.marker_behind(whole->node());
  WithInsertPoint guard(end);
  const LinearSite& query = inserter_.layer_sites().query;
  Value* x = inserter_.swapped(linear_input(query.node), query.sequence_first);
  Value* updated = at_rows(whole, rows, site, [&] {
    PrefixComposer composer(inserter_, site);
    Value* own_x = taken(x, rows);
    Value* result = prefix_attention(composer(composition.tree, own_x), own_x, rows);
    return Evaluated{result, composer.gates()};
  });
  whole->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
  attentions_[inserter_.layer()] = updated;
}

Value* CompositionInserter::prefix_attention(const std::pair<Value*, Value*>& prefix, Value* x, const Rows& rows) {
  Node* attention = inserter_.layer_sites().attention;
  const auto of = [&](const char* name) { return attention->namedInput(name); };
  Value* batch = graph_.insert(c10::aten::size, {of("query"), 0});
  Value* mask = of("attn_mask");
  mask = is_none(mask) ? mask : call_rows(graph_, "taken_mask", {mask, batch, rows.uses, rows.rows})[0];
  Node* own = graph_.insertNode(graph_.createTupleUnpack(call_rows(graph_, "own_ids", {prefix.first})[0]));
  Node* op = inserter_.call(
      "gated_prefix_attention",
      {NamedValue(taken(of("query"), rows)), NamedValue(taken(of("key"), rows)), NamedValue(taken(of("value"), rows)),
       NamedValue(x), NamedValue(prefix.first), NamedValue(prefix.second), NamedValue(own->outputs()[1]),
       NamedValue(mask), NamedValue(of("dropout_p")), NamedValue(of("is_causal"))},
      {{"adapter_ids", own->outputs()[0]}, {"scale", of("scale")}, {"enable_gqa", of("enable_gqa")}});
  return op->outputs()[0];
}

}  // namespace torchgraft
