#include <torchgraft/patch/insert.h>

#include <torchgraft/patch/graph_utils.h>
#include <torchgraft/patch/hoist.h>
#include <torchgraft/patch/row_functions.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <map>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

// A residual site as it is being rewritten: ops chain on the branch, but each reads the original values.
struct ResidualState {
  ResidualSite site;
  Value* branch = nullptr;      // before any adapter
  Value* sum = nullptr;         // branch + residual, made when an adapter asks for it
  Value* normed_sum = nullptr;  // norm(branch + residual), likewise
  Value* stream = nullptr;      // what the model has behind the norm, or behind the add, with the adapters so far
};

class Inserter {
 public:
  Inserter(Graph& graph, const GraphSites& sites, const c10::TypePtr& adapters_type, const InsertOptions& options);

  void prepare_token_masks(const std::vector<BankSlot>& slots, const std::vector<SlotRun>& runs,
                           const torch::jit::Module& root);
  // Inserts the op of `slot` into one run of its layer and returns its gate.
  Value* insert(const BankSlot& slot, size_t layer);
  Value* adapter_ids() const { return adapter_ids_; }
  size_t ops() const { return ops_; }

 private:
  Value* insert_lora(const BankSlot& slot, const LinearSite& site);
  void insert_lora_elsewhere(const BankSlot& slot, torch::jit::Node* linear);
  Value* one_adapter();
  Value* insert_prefix(const BankSlot& slot, size_t layer);
  Value* insert_bottleneck(const BankSlot& slot, const ResidualSite& site);
  Value* sum(ResidualState& state);
  Value* normed_sum(ResidualState& state);
  // (output, gate) of a bottleneck on x; x and residual are [B, S, H].
  std::pair<Value*, Value*> bottleneck(const BankSlot& slot, Value* x, Value* residual);
  Node* call_bottleneck(const BankSlot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named);
  void replace_stream(ResidualState& state, const BankSlot& slot, Value* output);
  Value* slot_module(const BankSlot& slot);
  Value* parameter(const BankSlot& slot, Value* module, const std::string& name);
  std::vector<NamedValue> gate_arguments(const BankSlot& slot, Value* module);
  std::vector<NamedValue> common_arguments(const BankSlot& slot, Value* module);
  Value* token_mask(const BankSlot& slot);
  Node* marker_behind(Node* node);
  // (output, gate) of a LoRA; x is [B, S, in], base [B, S, out]. `adapter_ids` and `adapter` say whose.
  std::pair<Value*, Value*> lora(const BankSlot& slot, Value* x, Value* base, Value* adapter_ids, Value* adapter,
                                 Value* token_mask);
  Value* swapped(Value* value, bool sequence_first);
  Node* call(const char* op, at::ArrayRef<NamedValue> args, at::ArrayRef<NamedValue> named);

  Graph& graph_;
  const GraphSites& sites_;
  const InsertOptions& options_;
  std::map<const Node*, Value*> projections_;  // by the linear: its result with the adapters so far
  // By the add and the operand that is the branch: parallel blocks may be two operands of one add.
  std::map<std::pair<const Node*, size_t>, ResidualState> residuals_;
  std::map<const Value*, Value*> streams_;       // what has taken the place of a value of the residual stream
  std::map<const Value*, Value*> shared_masks_;  // token masks by attention mask
  std::map<int64_t, Value*> token_masks_;        // and by layer
  size_t ops_ = 0;                               // gated ones, inserted so far
  int64_t layer_ = 0;                            // where the op being inserted goes
  Value* adapters_ = nullptr;
  Value* adapter_ids_ = nullptr;
  Value* active_ = nullptr;
  Value* one_adapter_ = nullptr;  // see one_adapter()
  Value* input_mask_ = nullptr;
};

Inserter::Inserter(Graph& graph, const GraphSites& sites, const c10::TypePtr& adapters_type,
                   const InsertOptions& options)
    : graph_(graph), sites_(sites), options_(options) {
  adapter_ids_ = graph.addInput("adapter_ids")->setType(c10::OptionalType::ofTensor());
  WithInsertPoint guard(*graph.nodes().begin());
  adapters_ =
      graph.insertNode(graph.create(c10::prim::GetAttr, {graph.inputs()[0]}, 1)->s_(c10::attr::name, "adapters"))
          ->output();
  adapters_->setType(adapters_type);
  active_ = graph.insertGetAttr(adapters_, "active");
  if (options.token_mask_input) {
    input_mask_ = graph.insert(c10::aten::ne, {graph.inputs()[*options.token_mask_input], 0});
  }
}

Value* Inserter::swapped(Value* value, bool sequence_first) {
  return sequence_first ? graph_.insert(c10::aten::transpose, {value, 0, 1}) : value;
}

Value* Inserter::slot_module(const BankSlot& slot) {
  return graph_.insertGetAttr(graph_.insertGetAttr(adapters_, "layer_" + std::to_string(slot.number)), slot.name);
}

Value* Inserter::parameter(const BankSlot& slot, Value* module, const std::string& name) {
  return slot.parameters.count(name) ? graph_.insertGetAttr(module, name) : graph_.insertConstant(c10::IValue());
}

std::vector<NamedValue> Inserter::gate_arguments(const BankSlot& slot, Value* module) {
  return {{"gate_weight", parameter(slot, module, "gate_weight")}, {"gate_bias", parameter(slot, module, "gate_bias")}};
}

// gate_weight, gate_bias, adapter_ids, adapter and token_mask: the arguments that every op ends with.
std::vector<NamedValue> Inserter::common_arguments(const BankSlot& slot, Value* module) {
  std::vector<NamedValue> result = gate_arguments(slot, module);
  result.emplace_back("adapter_ids", adapter_ids_);
  result.emplace_back("adapter", active_);
  if (Value* mask = token_mask(slot)) {
    result.emplace_back("token_mask", mask);
  }
  return result;
}

// Null where gates are means over all tokens, or there are none.
Value* Inserter::token_mask(const BankSlot& slot) {
  if (!options_.pool_unpadded || !slot.parameters.count("gate_weight")) {
    return nullptr;
  }
  return input_mask_ ? input_mask_ : token_masks_.at(layer_);
}

// One mask of real tokens per attention mask, computed before the first projection of the layer, so that every op of it
// may read it. Done for all layers before anything is inserted.
void Inserter::prepare_token_masks(const std::vector<BankSlot>& slots, const std::vector<SlotRun>& runs,
                                   const torch::jit::Module& root) {
  Hoist hoist(root);
  for (const SlotRun& run : runs) {
    const auto layer = static_cast<int64_t>(run.layer);
    if (!slots[run.slot].parameters.count("gate_weight") || token_masks_.count(layer)) {
      continue;
    }
    const LayerSites& sites = sites_.layers[run.layer];
    Value* mask = sites.attention->input(3);
    while (is_aten(mask->node(), {"type_as"})) {
      mask = mask->node()->input(0);
    }
    Value*& shared = shared_masks_[mask];
    if (!shared) {
      const LinearSite* first = &sites.query;
      for (const LinearSite* site : {&sites.key, &sites.value}) {
        first = site->node->isBefore(first->node) ? site : first;
      }
      WithInsertPoint guard(first->node);
      Value* x = first->node->input(0);
      TORCH_CHECK(is_none(mask) || hoist(mask, first->node, x),
                  "graft: gate_pooling=\"unpadded\": the attention mask of layer ", layer,
                  " is computed from its queries or keys, so it is not known before them; name the forward argument "
                  "that is the token mask (token_mask_input)");
      shared =
          call("attention_token_mask", {NamedValue(swapped(x, first->sequence_first)), NamedValue(mask)}, {})->output();
    }
    token_masks_[layer] = shared;
  }
}

Node* Inserter::call(const char* op, at::ArrayRef<NamedValue> args, at::ArrayRef<NamedValue> named) {
  Value* result = graph_.insert(c10::Symbol::fromQualString(std::string("torchgraft::") + op), args, named);
  ops_ += std::string(op).rfind("gated_", 0) == 0;
  Node* node = result->node();
  // Graph::insert packs several results into a tuple; take them apart again.
  if (node->kind() == c10::prim::TupleConstruct) {
    Node* source = node->input(0)->node();
    node->destroy();
    return source;
  }
  return node;
}

// What is inserted before the marker still reads the present result of `node`; it is for the caller to destroy.
Node* Inserter::marker_behind(Node* node) {
  Node* marker = graph_.create(c10::prim::Constant, 1)->insertAfter(node);
  marker->output()->setType(c10::NoneType::get());
  return marker;
}

std::pair<Value*, Value*> Inserter::lora(const BankSlot& slot, Value* x, Value* base, Value* adapter_ids, Value* adapter,
                                         Value* token_mask) {
  Value* module = slot_module(slot);
  std::pair<Value*, Value*> result;  // (output, gate)
  if (slot.lora != LoRAForm::kScale) {
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

Value* Inserter::insert_lora(const BankSlot& slot, const LinearSite& site) {
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
void Inserter::insert_lora_elsewhere(const BankSlot& slot, Node* linear) {
  Value* adapter = one_adapter();
  Node* end = marker_behind(linear);
  WithInsertPoint guard(end);
  Value* none = graph_.insertConstant(c10::IValue());
  Value* updated = lora(slot, linear->input(0), linear->output(), none, adapter, nullptr).first;
  linear->output()->replaceAllUsesAfterNodeWith(end, updated);
  end->destroy();
}

Value* Inserter::insert_prefix(const BankSlot& slot, size_t layer) {
  Node* attention = sites_.layers[layer].attention;
  WithInsertPoint guard(attention);
  const LinearSite& query = sites_.layers[layer].query;
  Value* x = swapped(query.node->input(0), query.sequence_first);
  Value* module = slot_module(slot);
  std::vector<NamedValue> named = common_arguments(slot, module);
  named.emplace_back("scale", attention->namedInput("scale"));
  named.emplace_back("enable_gqa", attention->namedInput("enable_gqa"));
  Node* op =
      call("gated_prefix_attention",
           {NamedValue(attention->input(0)), NamedValue(attention->input(1)), NamedValue(attention->input(2)),
            NamedValue(x), NamedValue(parameter(slot, module, "prefix_key")),
            NamedValue(parameter(slot, module, "prefix_value")), NamedValue(parameter(slot, module, "prefix_length")),
            NamedValue(attention->input(3)), NamedValue(attention->input(4)), NamedValue(attention->input(5))},
           named);
  attention->output()->replaceAllUsesWith(op->outputs()[0]);
  return op->outputs()[1];
}

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

Node* Inserter::call_bottleneck(const BankSlot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named) {
  Value* module = slot_module(slot);
  return call("gated_bottleneck",
              {NamedValue(x), NamedValue(residual), NamedValue(parameter(slot, module, "down_weight")),
               NamedValue(parameter(slot, module, "down_bias")), NamedValue(parameter(slot, module, "up_weight")),
               NamedValue(parameter(slot, module, "up_bias")), NamedValue(parameter(slot, module, "scaling")),
               NamedValue(graph_.insertConstant(slot.form.non_linearity))},
              named);
}

// The op adds the residual itself, unless a norm comes between. Its gate reads what its down projection reads, unless
// a norm comes before that: then the gate is pooled beside the op.
std::pair<Value*, Value*> Inserter::bottleneck(const BankSlot& slot, Value* x, Value* residual) {
  Value* module = slot_module(slot);
  const BottleneckForm& form = slot.form;
  if (!form.norm_before && !form.norm_after) {
    Node* op = call_bottleneck(slot, x, residual, common_arguments(slot, module));
    return {op->outputs()[0], op->outputs()[1]};
  }
  RowFunctions rows(graph_, adapter_ids_, active_);
  const auto normed = [&](Value* value, const std::string& name) {
    return rows.normed(value, parameter(slot, module, name + "_weight"), parameter(slot, module, name + "_bias"));
  };
  const bool gate_is_apart = form.norm_before && slot.parameters.count("gate_weight") > 0;
  std::vector<NamedValue> named = {{"adapter_ids", adapter_ids_}, {"adapter", active_}};
  Node* op = call_bottleneck(slot, form.norm_before ? normed(x, "norm_before") : x,
                             graph_.insert(c10::aten::zeros_like, {x}),
                             gate_is_apart ? named : common_arguments(slot, module));
  Value* output = op->outputs()[0];
  Value* gate = op->outputs()[1];
  if (gate_is_apart) {
    Value* mask = token_mask(slot);
    gate = rows.pooled(x, parameter(slot, module, "gate_weight"), parameter(slot, module, "gate_bias"),
                       mask ? mask : graph_.insertConstant(c10::IValue()));
    output = graph_.insert(c10::aten::mul, {output, graph_.insert(c10::aten::unsqueeze, {gate, -1})});
  }
  if (form.residual_in_norm) {
    return {normed(graph_.insert(c10::aten::add, {output, residual}), "norm_after"), gate};
  }
  output = form.norm_after ? normed(output, "norm_after") : output;
  return {graph_.insert(c10::aten::add, {output, residual}), gate};
}

// Without original_ln_after the adapter has the last word: neither residual nor norm comes behind it.
void Inserter::replace_stream(ResidualState& state, const BankSlot& slot, Value* output) {
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
Value* Inserter::insert_bottleneck(const BankSlot& slot, const ResidualSite& site) {
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
  const auto [output, gate] =
      bottleneck(slot, swapped(x, site.sequence_first), swapped(residual, site.sequence_first));
  if (slot.form.replaces_norm) {
    replace_stream(state, slot, output);
    return gate;
  }
  Value* updated = output;
  if (!slot.form.is_plain()) {
    RowFunctions rows(graph_, adapter_ids_, active_);
    updated = rows.choose(parameter(slot, slot_module(slot), "present"), output,
                          swapped(site.branch(), site.sequence_first));
  }
  site.add->replaceInput(site.branch_operand, swapped(updated, site.sequence_first));
  return gate;
}

Value* Inserter::insert(const BankSlot& slot, size_t layer) {
  const LayerSites& sites = sites_.layers[layer];
  layer_ = static_cast<int64_t>(layer);
  if (const LinearSite* linear = lora_site(sites, slot.slot)) {
    Value* gate = insert_lora(slot, *linear);
    for (Node* other : linear->elsewhere) {
      insert_lora_elsewhere(slot, other);
    }
    return gate;
  }
  if (slot.slot == "mh_adapter" || slot.slot == "cross_adapter") {
    return insert_bottleneck(slot, sites.attention_residual.value());
  }
  if (slot.slot == "output_adapter") {
    return insert_bottleneck(slot, sites.ffn_residual.value());
  }
  TORCH_INTERNAL_ASSERT(slot.slot.ends_with("_prefix"), slot.slot, " was planned for layer ", layer,
                        ", which has no place for it");
  return insert_prefix(slot, layer);
}

}  // namespace

size_t insert_adapters(const std::shared_ptr<Graph>& graph, const GraphSites& sites, const std::vector<BankSlot>& slots,
                       const std::vector<SlotRun>& runs, const torch::jit::Module& module,
                       const InsertOptions& options) {
  Inserter inserter(*graph, sites, module.attr("adapters").toModule().type(), options);
  if (options.pool_unpadded && !options.token_mask_input) {
    inserter.prepare_token_masks(slots, runs, module);
  }
  std::vector<Value*> gates;
  for (const SlotRun& run : runs) {
    gates.push_back(inserter.insert(slots[run.slot], run.layer));
  }
  WithInsertPoint guard(graph->return_node());
  Value* list = graph->insertNode(graph->createList(c10::TensorType::get(), gates))->output();
  Value* pair = graph->insertNode(graph->createTuple({graph->outputs()[0], list}))->output();
  graph->eraseOutput(0);
  graph->registerOutput(pair);
  torch::jit::EliminateDeadCode(graph);  // the attentions that gated_prefix_attention has replaced
  return inserter.ops();
}

}  // namespace torchgraft
