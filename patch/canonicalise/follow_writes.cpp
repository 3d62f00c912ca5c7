#include <torchgraft/patch/canonicalise/follow_writes.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool takes_part(const Node* node) {
  const auto kind = node->kind();
  return is_aten(node, {"select", "slice"}) || kind == c10::prim::TupleUnpack || kind == c10::prim::TupleIndex ||
         kind == c10::prim::ListUnpack || kind == c10::prim::unchecked_cast || kind == c10::aten::__getitem__;
}

// Whether `node` reads what a list or dict holds, which may change.
bool reads_element(const Node* node) {
  return node->kind() == c10::aten::__getitem__ || node->kind() == c10::prim::ListUnpack;
}

Value* before_whole_slices(Value* value) {
  while (is_whole_slice(value->node())) {
    value = value->node()->namedInput("self");
  }
  return value;
}

bool is_from_outside(const Value* value) {
  const Node* node = value->node();
  while (takes_part(node)) {
    node = node->input(0)->node();
  }
  return node->kind() == c10::prim::GetAttr || node == value->owningGraph()->param_node();
}

// Whether two values are one tensor, or the same part of one. No attribute is assigned in the graph. `elements_stay`:
// no list or dict that the graph was given changes either.
bool is_same_part(Value* a, Value* b, bool elements_stay) {
  a = before_whole_slices(a);
  b = before_whole_slices(b);
  if (a == b) {
    return true;
  }
  const auto constant = resolve_constant(a);
  if (const auto other = resolve_constant(b); constant && other) {
    const bool are_ints = constant->isInt() && other->isInt();
    const bool are_texts = constant->isString() && other->isString();
    return (are_ints && constant->toInt() == other->toInt()) ||
           (are_texts && constant->toStringRef() == other->toStringRef());
  }
  Node* left = a->node();
  Node* right = b->node();
  const bool is_attribute = left->kind() == c10::prim::GetAttr;
  if (left->kind() != right->kind() || a->offset() != b->offset() || (!is_attribute && !takes_part(left)) ||
      (!elements_stay && reads_element(left)) || left->inputs().size() != right->inputs().size() ||
      (is_attribute && left->s(c10::attr::name) != right->s(c10::attr::name))) {
    return false;
  }
  for (size_t i = 0; i < left->inputs().size(); ++i) {
    if (!is_same_part(left->input(i), right->input(i), elements_stay)) {
      return false;
    }
  }
  return true;
}

// What writes `source` into whole[..., start:end:step]. Replaces `writer`, a copy_ into that slice.
Node* insert_index_copy(Graph& graph, Node* writer, Node* slice) {
  torch::jit::WithInsertPoint guard(writer);
  Value* view = writer->namedInput("self");
  Value* whole = before_whole_slices(slice->namedInput("self"));
  Value* dim = slice->namedInput("dim");
  Value* size = graph.insert(c10::aten::size, {whole, dim});
  Value* device = graph.insert(c10::prim::device, {whole});
  Value* all = graph.insert(c10::aten::arange, {size}, {torch::jit::NamedValue("device", device)});
  Value* index = graph.insert(
      c10::aten::slice, {all, 0, slice->namedInput("start"), slice->namedInput("end"), slice->namedInput("step")});
  Value* source = graph.insert(c10::aten::type_as, {writer->input(1), view});
  source = graph.insert(c10::aten::expand_as, {source, view});
  Value* written = graph.insert(c10::Symbol::aten("index_copy_"), {whole, dim, index, source});
  written->node()->setSourceRange(writer->sourceRange());
  writer->output()->replaceAllUsesWith(view);
  writer->destroy();
  return written->node();
}

// The node whose result is the written tensor: `writer`, or an index_copy_ in its stead; null for other nodes.
Node* whole_writer(Graph& graph, Node* writer) {
  if (is_aten(writer, {"index_copy", "index_put", "scatter"})) {
    return writer;
  }
  Node* slice = before_whole_slices(writer->namedInput("self"))->node();
  const bool is_slice = is_aten(writer, {"copy"}) && is_aten(slice, {"slice"}) && is_tensor(slice->input(0)) &&
                        constant_int(slice->namedInput("dim")).has_value() && is_tensor(writer->input(1));
  return is_slice ? insert_index_copy(graph, writer, slice) : nullptr;
}

// Gives what reads the written tensor behind `writer`, in its block, the writer's result.
void read_result(Node* writer, bool elements_stay) {
  Value* written = writer->namedInput("self");
  Block* block = writer->owningBlock();
  const auto replace = [&](Node* reader) {
    for (size_t i = 0; i < reader->inputs().size(); ++i) {
      if (is_tensor(reader->input(i)) && is_same_part(reader->input(i), written, elements_stay)) {
        reader->replaceInput(i, writer->output());
      }
    }
  };
  for_each_node(block, [&](Node* reader) {
    if (reader != writer && reader->isAfter(writer)) {
      replace(reader);
      for (Block* inner : reader->blocks()) {
        replace(inner->return_node());
      }
    }
  });
  replace(block->return_node());
}

}  // namespace

void follow_writes(const std::shared_ptr<Graph>& graph) {
  std::vector<Node*> writers;
  bool assigns = false;
  bool elements_stay = true;
  for_each_node(graph->block(), [&](Node* node) {
    assigns = assigns || node->kind() == c10::prim::SetAttr;
    elements_stay = elements_stay && !changes_given_container(node);
    const bool writes = is_in_place(node) && is_aten(node, {"copy", "index_copy", "index_put", "scatter"});
    if (writes && node->outputs().size() == 1 && is_from_outside(node->namedInput("self"))) {
      writers.push_back(node);
    }
  });
  for (Node* writer : assigns ? std::vector<Node*>() : writers) {
    if (Node* whole = whole_writer(*graph, writer)) {
      read_result(whole, elements_stay);
    }
  }
}

}  // namespace torchgraft
