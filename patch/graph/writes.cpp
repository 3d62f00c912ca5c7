#include <torchgraft/patch/graph/writes.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::ValueSet;

bool is_writer(const Node* node) {
  const auto* schema = node->maybeSchema();
  return schema && schema->is_mutable();
}

std::string described(const Node* node) {
  std::string result = node->kind().toQualString();
  if (const auto position = node->sourceRange().file_line_col()) {
    result += " at " + std::get<0>(*position) + ":" + std::to_string(std::get<1>(*position));
  }
  return result;
}

Writes::Writes(const std::shared_ptr<Graph>& graph) {
  for_each_node(graph->block(), [&](Node* node) {
    if (is_writer(node)) {
      writers_.push_back(node);
    }
  });
  if (!writers_.empty()) {
    aliases_.emplace(graph);
  }
}

Node* Writes::between(const Node* begin, const Node* end, const ValueSet& values) const {
  const auto found = std::find_if(writers_.begin(), writers_.end(), [&](Node* writer) {
    return writer != begin && writer->isAfter(begin) && writer->isBefore(end) &&
           aliases_->writesToAlias(writer, values);
  });
  return found == writers_.end() ? nullptr : *found;
}

}  // namespace torchgraft
