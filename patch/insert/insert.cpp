#include <torchgraft/patch/insert/insert.h>

#include <torchgraft/patch/adapters/parallel_rows.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/insert_bottleneck.h>
#include <torchgraft/patch/insert/insert_compositions.h>
#include <torchgraft/patch/insert/insert_invertible.h>
#include <torchgraft/patch/insert/insert_lora.h>
#include <torchgraft/patch/insert/insert_prefix.h>
#include <torchgraft/patch/insert/insert_prompt.h>
#include <torchgraft/patch/insert/insert_reft.h>
#include <torchgraft/patch/insert/inserter.h>
#include <torchgraft/patch/insert/repeat_rows.h>
#include <torchgraft/patch/insert/share_attributes.h>
#include <torchgraft/patch/insert/verify.h>

#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// Throws c10::Error where something else in the module does not know of a prompt's tokens.
void check_beside_prompt(const std::vector<Slot>& slots, const InsertOptions& options) {
  constexpr const char* kApart = "; keep the adapters with prompts in a module of their own";
  TORCH_CHECK(options.compositions.empty(), "graft: a module with prompt_tuning cannot have compositions", kApart);
  TORCH_CHECK(!options.poolings.unpadded,
              "graft: beside prompt_tuning gate_pooling=\"unpadded\" is not supported: the ",
              "mask does not tell of the prompt's tokens; use gate_pooling=\"all\"", kApart);
  for (const Slot& slot : slots) {
    TORCH_CHECK(slot.site != "output_reft", "graft: a module with prompt_tuning cannot have ReFT, whose positions ",
                "would be those of the prompt", kApart);
  }
  for (const Adapter& adapter : *options.adapters) {
    TORCH_CHECK(!adapter.head || adapter.head->config.head_type == "tagging" || adapter.head->config.pooling == "first",
                "graft: beside prompt_tuning a head must have pooling=\"first\", that of '", adapter.name,
                "' has pooling=\"", adapter.head ? adapter.head->config.pooling : "", "\"", kApart);
  }
}

// Throws c10::Error where the adapters cannot stand in a branch, as some layers do.
void check_in_branches(const torch::jit::Graph& graph, const GraphSites& sites, const std::vector<Slot>& slots,
                       const InsertOptions& options) {
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    const Node* query = sites.layers[i].query.node;
    if (!query || query->owningBlock() == graph.block()) {
      continue;
    }
    const Layer& layer = sites.structure.layers[i];
    const std::string where = c10::str("layer ", layer.number, layer.query ? " (" + layer.query->path + ")" : "",
                                       " stands in a branch of the module");
    TORCH_CHECK(options.compositions.empty(), "compose: no composition can be in this module: ", where,
                "; make the branch constant, or use adapters by themselves");
    TORCH_CHECK(std::none_of(slots.begin(), slots.end(), is_prompt),
                "graft: no prompt_tuning can be in this module: ", where,
                "; make the branch constant, or use prefix_tuning");
  }
}

// A gate that is made in a branch, as a value of the graph's own block: a tensor of one dimension where the branch did
// not run (Adapters.collect_gates knows).
Value* outside_of_branches(Graph& graph, Value* gate) {
  while (gate->node()->owningBlock() != graph.block()) {
    torch::jit::Block* block = gate->node()->owningBlock();
    Node* branch = block->owningNode();
    for (torch::jit::Block* other : branch->blocks()) {
      if (other == block) {
        block->registerOutput(gate);
        continue;
      }
      WithInsertPoint guard(other->return_node());
      Value* shape = graph.insertConstant(std::vector<int64_t>{0});
      other->registerOutput(graph.insert(c10::aten::zeros, {shape}));
    }
    gate = branch->addOutput()->setType(c10::TensorType::get());
  }
  return gate;
}

// Makes the graph return (its result, gates).
void return_with(Graph& graph, std::vector<Value*> gates) {
  std::transform(gates.begin(), gates.end(), gates.begin(),
                 [&](Value* gate) { return outside_of_branches(graph, gate); });
  WithInsertPoint guard(graph.return_node());
  Value* list = graph.insertNode(graph.createList(c10::TensorType::get(), gates))->output();
  Value* pair = graph.insertNode(graph.createTuple({graph.outputs()[0], list}))->output();
  graph.eraseOutput(0);
  graph.registerOutput(pair);
}

// The gate of the slot's op; `attentions` gets the result of one with prefixes.
Value* insert(Inserter& inserter, const Slot& slot, LoraInserter& insert_lora, BottleneckInserter& insert_bottleneck,
              std::map<size_t, Value*>& attentions) {
  const LayerSites& layer = inserter.layer_sites();
  if (const LinearSite* linear = lora_site(layer, slot.site)) {
    return insert_lora(slot, *linear);
  }
  if (slot.site == "mh_adapter" || slot.site == "cross_adapter") {
    return insert_bottleneck(slot, layer.attention_residual.value());
  }
  if (slot.site == "output_adapter") {
    return insert_bottleneck(slot, layer.ffn_residual.value());
  }
  TORCH_INTERNAL_ASSERT(slot.site.ends_with("_prefix"), slot.site, " was planned for layer ", inserter.layer(),
                        ", which has no such site");
  Node* op = insert_prefix(inserter, slot);
  attentions[inserter.layer()] = op->outputs()[0];
  return op->outputs()[1];
}

// nullopt without a prompt among the slots.
std::optional<PromptInserter> begin_prompts(Inserter& inserter, const GraphSites& sites, const std::vector<Slot>& slots,
                                            const torch::jit::Module& module, const InsertOptions& options) {
  const auto slot = std::find_if(slots.begin(), slots.end(), is_prompt);
  if (slot == slots.end()) {
    return std::nullopt;
  }
  check_beside_prompt(slots, options);
  PromptInserter prompts(inserter, sites.embeddings.value(), *slot, module);
  inserter.set_own_tokens(prompts.own_tokens());
  return prompts;
}

// Last, so that all ops read what they change. Their gates are null so far.
void insert_all_invertible(Inserter& inserter, const GraphSites& sites, const std::vector<Slot>& slots,
                           const std::vector<SlotRun>& gated, std::vector<Value*>& gates) {
  for (size_t i = gated.size(); i-- > 0;) {
    if (!gates[i]) {
      const Slot& slot = slots[gated[i].slot];
      inserter.enter(slot, gated[i].layer);
      const Inserter::Scope first = inserter.first_of_each();
      gates[i] = insert_invertible(inserter, sites.embeddings.value(), slot);
    }
  }
}

void tidy(const std::shared_ptr<Graph>& graph) {
  share_attributes(*graph);
  torch::jit::EliminateDeadCode(graph);  // the attentions that gated_prefix_attention has replaced
}

}  // namespace

size_t insert_adapters(const std::shared_ptr<Graph>& graph, const GraphSites& sites, const std::vector<Slot>& slots,
                       const std::vector<SlotRun>& runs, const torch::jit::Module& module,
                       const InsertOptions& options) {
  check_in_branches(*graph, sites, slots, options);
  std::optional<RowRepeater> repeat_rows;
  if (has_parallel(options.compositions)) {
    repeat_rows.emplace(*graph, sites, module);
  }
  Inserter inserter(*graph, sites, module, options);
  std::optional<PromptInserter> prompts = begin_prompts(inserter, sites, slots, module, options);
  if (options.poolings.unpadded && !options.token_mask_input) {
    inserter.prepare_token_masks(slots, runs, module);
  }
  inserter.prepare_reft(slots);
  LoraInserter insert_lora(inserter);
  BottleneckInserter insert_bottleneck(inserter);
  std::map<size_t, Value*> attentions;  // results of the ops with prefixes
  std::vector<Value*> gates;
  for (const SlotRun& run : runs) {
    const Slot& slot = slots[run.slot];
    if (is_prompt(slot)) {
      continue;
    }
    inserter.enter(slot, run.layer);
    if (!has_gate(slot)) {
      const Inserter::Scope first = inserter.first_of_each();
      insert_reft(inserter, slot);
    } else {
      gates.push_back(slot.site == "inv_adapter" ? nullptr
                                                 : insert(inserter, slot, insert_lora, insert_bottleneck, attentions));
    }
  }
  if (!options.compositions.empty()) {
    CompositionInserter compositions(inserter, *options.adapters, insert_lora, insert_bottleneck, attentions);
    compositions(slots, runs);
    gates.insert(gates.end(), compositions.gates().begin(), compositions.gates().end());
    torch::jit::Module adapters = module.attr("adapters").toModule();
    set_composed_gates(adapters, compositions.described_gates());
  }
  insert_lora.join_packed_parts();
  insert_all_invertible(inserter, sites, slots, gated_runs(slots, runs), gates);
  if (prompts) {
    prompts->finish();
  }
  return_with(*graph, gates);
  if (repeat_rows) {
    (*repeat_rows)(options.compositions, inserter.first_composition_id(), options.examples);
  }
  tidy(graph);
  // A composition may drop what an adapter in it has made: a parallel bottleneck in a Stack reads the residual.
  return options.compositions.empty() ? inserter.ops() : count_ops(*graph);
}

}  // namespace torchgraft
