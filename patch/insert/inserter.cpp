#include <torchgraft/patch/insert/inserter.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/hoist.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/insert/row_functions.h>
#include <torchgraft/patch/insert/verify.h>

#include <torch/csrc/jit/ir/constants.h>

#include <utility>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// 4 is torch.int64: TorchScript that is compiled in C++ has no name for it. The operators check the rest.
constexpr const char* kPlainRows = R"python(
def plain_ids(adapter_ids: Optional[Tensor], adapters: int, ids: int) -> Optional[Tensor]:
    if adapter_ids is None:
        return None
    else:
        if adapter_ids.dtype == 4 and not adapter_ids.is_cuda:
            wrong = adapter_ids.ge(ids).nonzero()
            if wrong.size(0) > 0:
                row = int(wrong[0, 0])
                assert False, "forward: expected adapter_ids in [-1, {}), got {} in row {}".format(
                    ids, int(adapter_ids[row]), row)
        return adapter_ids.masked_fill(adapter_ids.ge(adapters).logical_and(adapter_ids.lt(ids)), -1)

def plain_active(active: int, adapters: int) -> int:
    if active >= adapters:
        return -1
    return active

def first_ids(adapter_ids: Optional[Tensor], adapters: int, firsts: List[int]) -> Optional[Tensor]:
    if adapter_ids is None:
        return None
    else:
        result = adapter_ids
        for i in range(len(firsts)):
            result = result.masked_fill(adapter_ids.eq(adapters + i), firsts[i])
        return result

def pooled_firsts(adapter_ids: Optional[Tensor], adapters: int, parts: List[List[int]]) -> List[int]:
    result: List[int] = []
    for i in range(len(parts)):
        first = -1
        if adapter_ids is not None:
            if bool(adapter_ids.eq(adapters + i).any()):
                first = parts[i][0]
        result.append(first)
    return result

def first_active(active: int, adapters: int, firsts: List[int]) -> int:
    if active >= adapters:
        return firsts[active - adapters]
    return active
)python";

Value* at_top(Graph& graph, const char* function, std::vector<Value*> arguments) {
  return torch::jit::insertGraph(graph, *compile_graph(kPlainRows, function), arguments)[0];
}

}  // namespace

Inserter::Inserter(Graph& graph, const GraphSites& sites, const torch::jit::Module& root, const InsertOptions& options)
    : graph_(graph), sites_(sites), options_(options) {
  adapter_ids_ = graph.addInput("adapter_ids")->setType(c10::OptionalType::ofTensor());
  WithInsertPoint guard(*graph.nodes().begin());
  adapters_ =
      graph.insertNode(graph.create(c10::prim::GetAttr, {graph.inputs()[0]}, 1)->s_(c10::attr::name, "adapters"))
          ->output();
  adapters_module_ = root.attr("adapters").toModule();
  adapters_->setType(adapters_module_.type());
  active_ = graph.insertGetAttr(adapters_, "active");
  all_adapter_ids_ = adapter_ids_;
  all_active_ = active_;
  if (!options.compositions.empty()) {
    hide_compositions();
  }
  Node* end = graph.insertNode(graph.createNone());  // trained banks are made before it; dead code in the end
  trained_.emplace(graph, sites, root, adapters_, end);
  top_ = end;
  if (options.token_mask_input) {
    real_input_ = graph.insert(c10::aten::ne, {graph.inputs()[*options.token_mask_input], 0});
    input_mask_ = options.poolings.unpadded ? with_whole_rows(real_input_) : nullptr;
  }
}

// Makes rows of compositions rows of the base.
void Inserter::hide_compositions() {
  Value* count = graph_.insertConstant(first_composition_id());
  Value* ids = graph_.insertConstant(first_composition_id() + static_cast<int64_t>(options_.compositions.size()));
  Value* first = nullptr;
  if (options_.pool_rows) {
    first = at_top(graph_, "pooled_firsts", {adapter_ids_, count, composition_parts()});
  } else {
    std::vector<int64_t> firsts;
    for (const NamedComposition& composition : options_.compositions) {
      firsts.push_back(
          static_cast<int64_t>(find_adapter(*options_.adapters, first_adapter(composition.tree), "compose")));
    }
    first = graph_.insertConstant(firsts);
  }
  first_adapter_ids_ = at_top(graph_, "first_ids", {adapter_ids_, count, first});
  first_active_ = at_top(graph_, "first_active", {active_, count, first});
  adapter_ids_ = at_top(graph_, "plain_ids", {adapter_ids_, count, ids});
  active_ = at_top(graph_, "plain_active", {active_, count});
}

Inserter::Scope::Scope(Inserter& inserter, Value* adapter_ids, Value* active, bool is_composing)
    : inserter_(inserter),
      adapter_ids_(std::exchange(inserter.adapter_ids_, adapter_ids)),
      active_(std::exchange(inserter.active_, active)),
      is_composing_(std::exchange(inserter.is_composing_, is_composing)) {}

Inserter::Scope::~Scope() {
  inserter_.adapter_ids_ = adapter_ids_;
  inserter_.active_ = active_;
  inserter_.is_composing_ = is_composing_;
}

Inserter::Scope Inserter::first_of_each() {
  const bool has_compositions = first_active_ != nullptr;
  return {*this, has_compositions ? first_adapter_ids_ : adapter_ids_, has_compositions ? first_active_ : active_,
          is_composing_};
}

Inserter::Scope Inserter::one_adapter(Value* adapter) {
  return {*this, graph_.insertConstant(c10::IValue()), adapter, /*is_composing=*/true};
}

int64_t Inserter::first_composition_id() const {
  return options_.pool_rows.value_or(static_cast<int64_t>(options_.adapters->size()));
}

Value* Inserter::composition_parts() {
  return options_.pool_rows ? graph_.insertGetAttr(adapters_, kCompositionParts) : nullptr;
}

Value* Inserter::swapped(Value* value, bool sequence_first) {
  return sequence_first ? graph_.insert(c10::aten::transpose, {value, 0, 1}) : value;
}

Value* Inserter::slot_module(const Slot& slot) {
  return graph_.insertGetAttr(graph_.insertGetAttr(adapters_, "layer_" + std::to_string(slot.number)), slot.name);
}

Value* Inserter::parameter(const Slot& slot, Value* module, const std::string& name) {
  if (!slot.parameters.count(name)) {
    return graph_.insertConstant(c10::IValue());
  }
  return slot.own.empty() ? graph_.insertGetAttr(module, name) : trained_->bank(slot, name);
}

const AdapterFusion* Inserter::find_fusion(const std::string& name) const {
  for (const AdapterFusion& fusion : options_.fusions) {
    if (fusion.name() == name) {
      return &fusion;
    }
  }
  return nullptr;
}

Value* Inserter::new_buffer(const at::Tensor& tensor) {
  const std::string name = kFoldedBuffer + std::to_string(buffers_++);
  adapters_module_.register_buffer(name, tensor);
  return graph_.insertGetAttr(adapters_, name);
}

Value* Inserter::fusion_weight(const AdapterFusion& fusion, const Slot& slot, const std::string& name) {
  Value* held = graph_.insertGetAttr(adapters_, fusion_module_name(fusion.name()));
  return graph_.insertGetAttr(graph_.insertGetAttr(held, fusion_layer_name(slot.number, slot.site)), name);
}

Value* Inserter::dropped(Value* value, double p) {
  return graph_.insert(c10::aten::dropout, {value, p, graph_.insertGetAttr(adapters_, "training")});
}

Value* Inserter::rows_dropped(const Slot& slot, Value* value) {
  Value* rows = graph_.insert(c10::aten::unsqueeze, {value, 1});  // one feature of each row
  Value* training = graph_.insertGetAttr(adapters_, "training");
  Value* kept = graph_.insert(c10::aten::feature_dropout, {rows, slot.stochastic_depth, training});
  return graph_.insert(c10::aten::squeeze, {kept, 1});
}

std::vector<NamedValue> Inserter::gate_arguments(const Slot& slot, Value* module) {
  return {{"gate_weight", parameter(slot, module, "gate_weight")}, {"gate_bias", parameter(slot, module, "gate_bias")}};
}

std::vector<NamedValue> Inserter::common_arguments(const Slot& slot, Value* module) {
  std::vector<NamedValue> result = gate_arguments(slot, module);
  result.emplace_back("adapter_ids", adapter_ids_);
  result.emplace_back("adapter", active_);
  if (Value* mask = token_mask(slot)) {
    result.emplace_back("token_mask", mask);
  }
  return result;
}

Value* Inserter::with_whole_rows(Value* mask) {
  if (!options_.poolings.is_mixed()) {
    return mask;
  }
  return RowFunctions(graph_, adapter_ids_, active_).pooled_tokens(mask, graph_.insertGetAttr(adapters_, kPoolsAll));
}

// A mask that cannot be read hinders only the rows that need it.
Value* Inserter::readable(Value* mask, Value* x) {
  if (!options_.poolings.is_mixed() || is_none(mask)) {
    return mask;
  }
  return RowFunctions(graph_, adapter_ids_, active_)
      .shown_to_whole_rows(mask, x, graph_.insertGetAttr(adapters_, kPoolsAll));
}

Value* Inserter::token_mask(const Slot& slot) {
  if (is_composing_ || !slot.parameters.count("gate_weight")) {
    return nullptr;
  }
  if (!options_.poolings.unpadded) {
    return own_tokens_;
  }
  if (!input_mask_) {
    return token_masks_.at(layer_);
  }
  check_cache(layer_);
  const bool has_cache = sites_.structure.layers[layer_].cache != CacheKind::kNone;
  return has_cache ? of_this_pass(input_mask_, layer_) : input_mask_;
}

// A mask that can be read at the attention is read there. Layers with one mask share the result, so rows that some
// layer's ReFT changes count in all of them. Other rows may have masks that cannot be read.
Value* Inserter::real_tokens() {
  if (real_input_) {
    return real_input_;
  }
  const LayerSites& sites = layer_sites();
  Value* mask = sites.attention->namedInput("attn_mask");
  while (is_aten(mask->node(), {"type_as"})) {
    mask = mask->node()->namedInput("self");
  }
  if (is_none(mask)) {
    return nullptr;
  }
  Value*& real = real_tokens_[mask];
  if (!real) {
    WithInsertPoint guard(sites.attention);
    Value* x = swapped(linear_input(sites.query.node), sites.query.sequence_first);
    std::vector<Value*> positions;
    for (const Slot* slot : reft_slots_) {
      positions.push_back(parameter(*slot, slot_module(*slot), "positions"));
    }
    Value* shown = RowFunctions(graph_, adapter_ids_, active_).shown_without_positions(mask, x, positions);
    real = call("attention_token_mask", {NamedValue(x), NamedValue(shown)}, {})->output();
  }
  return real;
}

void Inserter::prepare_reft(const std::vector<Slot>& slots) {
  for (const Slot& slot : slots) {
    if (slot.parameters.count("positions")) {
      reft_slots_.push_back(&slot);
    }
  }
}

Value* Inserter::present_stream(Value* found) const {
  const auto replaced = streams_.find(found);
  return replaced == streams_.end() ? found : replaced->second;
}

// The tokens of a gate's mean are those of the pass; a mask tells of all keys.
void Inserter::check_cache(size_t layer) const {
  const Layer& described = sites_.structure.layers[layer];
  const LayerSites& sites = sites_.layers[layer];
  const bool ends_with_them = described.cache == CacheKind::kNone ||
                              (described.cache == CacheKind::kGrowing && sites.new_tokens_last && !sites.keeps_inputs);
  TORCH_CHECK(
      ends_with_them, "graft: gate_pooling=\"unpadded\": the mask of layer ", layer, ", whose cache is ",
      to_string(described.cache),
      ", does not end with the tokens of the pass; use gate_pooling=\"all\", or a cache that grows by torch.cat "
      "of earlier keys and new ones");
}

Value* Inserter::of_this_pass(Value* mask, size_t layer) {
  const LinearSite& query = sites_.layers[layer].query;
  Value* tokens = graph_.insert(c10::aten::size, {linear_input(query.node), query.sequence_first ? 0 : 1});
  Value* first = graph_.insert(c10::aten::neg, {tokens});
  return graph_.insert(c10::aten::slice, {mask, -1, first, graph_.insertConstant(c10::IValue()), 1});
}

void Inserter::prepare_token_masks(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs,
                                   const torch::jit::Module& root) {
  Hoist hoist(root);
  for (const SlotRun& run : runs) {
    const size_t layer = run.layer;
    if (!slots[run.slot].parameters.count("gate_weight") || token_masks_.count(layer)) {
      continue;
    }
    const LayerSites& sites = sites_.layers[layer];
    TORCH_CHECK(sites.attention, "graft: gate_pooling=\"unpadded\": the attention of layer ", layer,
                " was not recognised, so that its mask is not known; name the forward argument that is the token mask "
                "(token_mask_input), or use gate_pooling=\"all\"");
    Value* mask = sites.attention->namedInput("attn_mask");
    while (is_aten(mask->node(), {"type_as"})) {
      mask = mask->node()->namedInput("self");
    }
    check_cache(layer);
    Value*& shared = shared_masks_[{mask, sites.query.node->owningBlock()}];
    if (!shared) {
      const LinearSite* first = &sites.query;
      for (const LinearSite* site : {&sites.key, &sites.value}) {
        first = site->node && site->node->isBefore(first->node) ? site : first;
      }
      WithInsertPoint guard(first->node);
      Value* x = linear_input(first->node);
      TORCH_CHECK(is_none(mask) || hoist(mask, first->node, x),
                  "graft: gate_pooling=\"unpadded\": the attention mask of layer ", layer,
                  " is computed from its queries or keys, or written in place behind them, so it is not known before "
                  "them; name the forward argument that is the token mask (token_mask_input)");
      const bool narrows = !is_none(mask) && sites_.structure.layers[layer].cache != CacheKind::kNone;
      // The attention's own None may stand behind this place.
      Value* own = is_none(mask) ? graph_.insertConstant(c10::IValue()) : narrows ? of_this_pass(mask, layer) : mask;
      Value* rows = swapped(x, first->sequence_first);
      Node* real = call("attention_token_mask", {NamedValue(rows), NamedValue(readable(own, rows))}, {});
      shared = with_whole_rows(real->output());
    }
    token_masks_[layer] = shared;
  }
}

void Inserter::enter(const Slot& slot, size_t layer) {
  layer_ = layer;
  const Layer& described = sites_.structure.layers[layer];
  // The interpreter prints the source of a node that throws, also after saving and loading.
  std::string text = "layer " + std::to_string(described.number) + ", " + slot.site;
  if (described.query && !described.query->path.empty()) {
    text += ", beside " + described.query->path;
  }
  const size_t size = text.size();
  text += '\n';  // the error's own text follows
  place_.emplace(std::make_shared<torch::jit::Source>(std::move(text), "torchgraft", 1), 0, size);
}

Node* Inserter::call(const char* op, at::ArrayRef<NamedValue> args, at::ArrayRef<NamedValue> named) {
  const auto symbol = c10::Symbol::fromQualString(std::string("torchgraft::") + op);
  Value* result = graph_.insert(symbol, args, named, place_);
  ops_ += is_counted(op);
  Node* node = result->node();
  // Graph::insert packs several results into a tuple; take them apart again.
  if (node->kind() == c10::prim::TupleConstruct) {
    Node* source = node->input(0)->node();
    node->destroy();
    return source;
  }
  return node;
}

Node* Inserter::marker_behind(Node* node) {
  Node* marker = graph_.create(c10::prim::Constant, 1)->insertAfter(node);
  marker->output()->setType(c10::NoneType::get());
  return marker;
}

}  // namespace torchgraft
