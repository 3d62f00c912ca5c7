#include <torchgraft/patch/canonicalise/unpacked_results.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

UnpackedResults::UnpackedResults(const std::shared_ptr<torch::jit::Graph>& graph) : graph_(graph) {
  std::vector<Value*> values;
  std::vector<Node*> packers;
  for (Value* output : graph->outputs()) {
    results_.push_back(describe(output, values, packers));
  }
  for (size_t i = graph->outputs().size(); i-- > 0;) {
    graph->eraseOutput(i);
  }
  for (Node* packer : packers) {
    packer->destroy();
  }
  for (Value* value : values) {
    graph->registerOutput(value);
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

// Appends what `value` is packed of to `values`, and the nodes that pack it to `packers`, users before what they use.
// What is used twice stays a value: the result holds one object twice, or something changes it.
UnpackedResults::Packing UnpackedResults::describe(Value* value, std::vector<Value*>& values,
                                                   std::vector<Node*>& packers) const {
  Node* node = value->node();
  const bool packs = node->kind() == c10::prim::TupleConstruct || node->kind() == c10::prim::ListConstruct;
  Packing result{node->kind(), value->type(), node->sourceRange(), {}};
  if (!packs || value->uses().size() != 1 || node->owningBlock() != graph_->block()) {
    result.is_value = true;
    values.push_back(value);
    return result;
  }
  packers.push_back(node);
  for (Value* item : node->inputs()) {
    result.items.push_back(describe(item, values, packers));
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
