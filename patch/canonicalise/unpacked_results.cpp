#include <torchgraft/patch/canonicalise/unpacked_results.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

UnpackedResults::UnpackedResults(const std::shared_ptr<torch::jit::Graph>& graph) : graph_(graph) {
  const std::vector<Value*> outputs(graph->outputs().begin(), graph->outputs().end());
  for (size_t i = outputs.size(); i-- > 0;) {
    graph->eraseOutput(i);
  }
  for (Value* output : outputs) {
    results_.push_back(unpack(output));
  }
}

UnpackedResults::~UnpackedResults() {
  const std::vector<Value*> values(graph_->outputs().begin(), graph_->outputs().end());
  const torch::jit::WithInsertPoint guard(graph_->return_node());
  size_t next = 0;
  std::vector<Value*> packed;
  for (const Packing& result : results_) {
    packed.push_back(pack(result, next));
  }
  for (size_t i = values.size(); i-- > 0;) {
    graph_->eraseOutput(i);
  }
  for (Value* value : packed) {
    graph_->registerOutput(value);
  }
}

// Registers the values as outputs, in order, and removes the nodes that pack them.
UnpackedResults::Packing UnpackedResults::unpack(Value* value) {
  Node* node = value->node();
  const bool packs = node->kind() == c10::prim::TupleConstruct || node->kind() == c10::prim::ListConstruct;
  Packing result{node->kind(), value->type(), node->sourceRange(), {}};
  if (!packs || !value->uses().empty() || node->owningBlock() != graph_->block()) {
    result.is_value = true;
    graph_->registerOutput(value);
    return result;
  }
  const std::vector<Value*> items(node->inputs().begin(), node->inputs().end());
  node->destroy();
  for (Value* item : items) {
    result.items.push_back(unpack(item));
  }
  return result;
}

Value* UnpackedResults::pack(const Packing& packing, size_t& next) {
  if (packing.is_value) {
    return graph_->outputs()[next++];
  }
  std::vector<Value*> items;
  for (const Packing& item : packing.items) {
    items.push_back(pack(item, next));
  }
  Node* node = graph_->insertNode(graph_->create(packing.kind, items, 1));
  node->setSourceRange(packing.range);
  return node->output()->setType(packing.type);
}

}  // namespace torchgraft
