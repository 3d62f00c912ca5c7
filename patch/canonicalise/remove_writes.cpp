#include <torchgraft/patch/canonicalise/remove_writes.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/runtime/operator.h>

#include <algorithm>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::AliasDb;
using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

// Whether insert_undone() can put a written view back where it was taken from. It cannot for reshape, which may copy.
bool can_be_undone(const Node* view) {
  return is_aten(view, {"select", "slice", "transpose", "view"}) && !is_writer(view) && is_tensor(view->input(0));
}

// What a write changes: the `views` from the tensor that it writes into back to `root`, and `root`, which is no view.
struct Target {
  std::vector<Value*> views;  // the written one first; empty when the root itself is written
  Value* root = nullptr;

  bool holds(const Value* value) const {
    return value == root || std::find(views.begin(), views.end(), value) != views.end();
  }
};

Target target_of(Value* written) {
  Target target;
  while (can_be_undone(written->node())) {
    target.views.push_back(written);
    written = written->node()->namedInput("self");
  }
  target.root = written;
  return target;
}

// Whether a node of this graph has made the memory of `root`.
bool is_made_here(Value* root, const AliasDb& aliases) {
  Node* node = root->node();
  if (node->kind() == c10::prim::If) {
    return std::all_of(node->blocks().begin(), node->blocks().end(),
                       [&](Block* block) { return is_made_here(block->outputs()[root->offset()], aliases); });
  }
  if (is_aten(node, {"type_as"}) && node->namedInput("self")->uses().size() == 1) {  // as insert_functional() makes it
    return is_made_here(node->namedInput("self"), aliases);
  }
  const auto* schema = node->maybeSchema();
  if (!schema || !node->kind().is_aten() || is_writer(node) || may_return_operand(node) ||
      root->type()->kind() != c10::TypeKind::TensorType) {
    return false;
  }
  const auto* alias = schema->returns().at(root->offset()).alias_info();
  return !alias && !aliases.mayContainAlias(root, node->owningGraph()->inputs());
}

// The branches around `writer`, from the inside, up to the block of `root`; false when a loop is among them.
bool branches_between(const Node* writer, const Value* root, std::vector<Node*>& branches) {
  const Block* home = root->node()->owningBlock();
  for (const Block* block = writer->owningBlock(); block != home; block = block->owningNode()->owningBlock()) {
    Node* owner = const_cast<Node*>(block->owningNode());
    if (!owner || owner->kind() != c10::prim::If) {
      return false;
    }
    branches.push_back(owner);
  }
  return true;
}

bool is_read_behind(const Value* value, const Node* node) {
  return std::any_of(value->uses().begin(), value->uses().end(), [&](const torch::jit::Use& use) {
    return use.user != node && (use.user->kind() == c10::prim::Return || use.user->isAfter(node));
  });
}

std::vector<Value*> all_values(Block* block) {
  std::vector<Value*> values(block->inputs().begin(), block->inputs().end());
  for_each_node(block, [&](Node* node) {
    values.insert(values.end(), node->outputs().begin(), node->outputs().end());
    for (Block* inner : node->blocks()) {
      values.insert(values.end(), inner->inputs().begin(), inner->inputs().end());
    }
  });
  return values;
}

// Whether somebody asks how the elements of `value` lie in memory: where a write is removed, they may lie otherwise.
bool shows_its_strides(const Value* value) {
  return std::any_of(value->uses().begin(), value->uses().end(), [](const torch::jit::Use& use) {
    return is_aten(use.user,
                   {"as_strided", "as_strided_copy", "stride", "is_contiguous", "storage_offset", "data_ptr"});
  });
}

// Whether the write can be seen in the target and in the writer's own result only.
bool is_hidden(const Node* writer, const Target& target, const std::vector<Node*>& branches, const SharedMemory& memory,
               const std::vector<Value*>& values) {
  const torch::jit::ValueSet shared = memory.connected({target.root});
  for (Value* value : values) {
    // A value made behind the write is made from the target's new values, or from values that this loop checks.
    const auto blocks = value->node()->blocks();
    const bool ends_later =
        std::any_of(blocks.begin(), blocks.end(), [&](const Block* block) { return is_inside(writer, block); });
    const bool is_later = ends_later || value->node() == writer || value->node()->isAfter(writer);
    const bool shares = std::any_of(shared.begin(), shared.end(), [&](const Value* other) {
      return memory.aliases().mayContainAlias(value, const_cast<Value*>(other));
    });
    if (shares && shows_its_strides(value)) {
      return false;
    }
    if (shares && !is_later && !target.holds(value) && is_read_behind(value, writer)) {
      return false;
    }
  }
  // Behind the branches only the root gets a new value, so no view may be read there.
  return branches.empty() || std::none_of(target.views.begin(), target.views.end(),
                                          [&](const Value* view) { return is_read_behind(view, branches.front()); });
}

// An out-of-place operator with the overload and the arguments of `writer`; null when there is none.
Value* insert_variant(Graph& graph, Node* writer, c10::Symbol functional) {
  const auto& from = writer->schema();
  for (const auto& candidate : torch::jit::getAllOperatorsFor(functional)) {
    const auto& schema = candidate->schema();
    if (schema.overload_name() == from.overload_name() && !schema.is_mutable() &&
        schema.arguments().size() == from.arguments().size() && schema.returns().size() == 1) {
      Node* node = graph.insertNode(graph.create(functional, writer->inputs(), 1));
      node->setSourceRange(writer->sourceRange());
      return node->output()->setType(c10::TensorType::get());
    }
  }
  return nullptr;
}

// Computes out of place what `writer` leaves in the tensor that it writes into. Null when there is no way to.
Value* insert_functional(Graph& graph, Node* writer) {
  // What changes the sizes or the layout of a tensor changes no element.
  const bool changes_sizes =
      is_aten(writer, {"set", "resize", "resize_as", "unsqueeze", "squeeze", "t", "transpose", "swapaxes", "swapdims",
                       "as_strided", "detach", "requires_grad", "rename", "sparse_resize"});
  if (!is_in_place(writer) || changes_sizes) {
    return nullptr;
  }
  Value* written = writer->input(0);
  if (is_aten(writer, {"zero"})) {
    return graph.insert(c10::aten::zeros_like, {written});
  }
  if (is_aten(writer, {"copy"})) {
    Value* source = graph.insert(c10::aten::type_as, {writer->input(1), written});
    return graph.insert(c10::aten::clone, {graph.insert(c10::aten::expand_as, {source, written})});
  }
  const std::string name = writer->kind().toUnqualString();
  Value* result = insert_variant(graph, writer, c10::Symbol::aten(name.substr(0, name.size() - 1)));
  const bool promotes = writer->inputs().size() > 1 && is_tensor(writer->input(1));
  const bool decides = is_aten(writer, {"eq", "ne", "lt", "le", "gt", "ge", "equal", "not_equal", "less", "less_equal",
                                        "greater", "greater_equal", "logical_and", "logical_or", "logical_xor",
                                        "logical_not"});  // their variants give bool
  const bool keeps_dtype = !result || (!promotes && !decides);
  return keeps_dtype ? result : graph.insert(c10::aten::type_as, {result, written});  // as a write does
}

// Inserts `whole`, from which `view` was taken, with `part` instead of the view.
Value* insert_undone(Graph& graph, const Node* view, Value* whole, Value* part) {
  if (is_aten(view, {"select"})) {
    return graph.insert(c10::aten::select_scatter, {whole, part, view->namedInput("dim"), view->namedInput("index")});
  }
  if (is_whole_slice(view)) {
    return part;
  }
  if (is_aten(view, {"slice"})) {
    return graph.insert(c10::aten::slice_scatter, {whole, part, view->namedInput("dim"), view->namedInput("start"),
                                                   view->namedInput("end"), view->namedInput("step")});
  }
  if (is_aten(view, {"transpose"})) {
    return graph.insert(c10::aten::transpose, {part, view->namedInput("dim0"), view->namedInput("dim1")});
  }
  return graph.insert(c10::Symbol::aten("reshape_as"), {part, whole});
}

// Replaces `value` behind `node` at its uses inside `block`, the block's return included.
void replace_inside(Block* block, Value* value, const Node* node, Value* by) {
  const auto uses = value->uses();
  for (const auto& use : uses) {
    const bool inside = use.user == block->return_node() || is_inside(use.user, block);
    if (inside && use.user != node && use.user->isAfter(node)) {
      use.user->replaceInput(use.offset, by);
    }
  }
}

// Takes the views of `target` again, from `root`: they share its memory, as those before shared that of the root
// before. Inserts nothing where there are none. Parallel to target.views.
std::vector<Value*> insert_views(Graph& graph, const Target& target, Value* root) {
  std::vector<Value*> again(target.views.size());
  Value* whole = root;
  for (size_t i = target.views.size(); i-- > 0;) {
    Node* view = graph.insertNode(graph.createClone(target.views[i]->node(), [](Value* value) { return value; }));
    view->replaceInput(0, whole);
    whole = again[i] = view->output();
  }
  return again;
}

// Gives every reader behind `writer` the values that follow from `written`. The insert point of `graph` is before
// `writer`.
void rewrite(Graph& graph, Node* writer, const Target& target, const std::vector<Node*>& branches, Value* written) {
  Value* root = written;
  for (size_t i = 0; i < target.views.size(); ++i) {
    Value* whole = i + 1 < target.views.size() ? target.views[i + 1] : target.root;
    root = insert_undone(graph, target.views[i]->node(), whole, root);
  }
  if (!target.views.empty() && is_aten(target.views.back()->node(), {"transpose", "view"})) {
    root = graph.insert(c10::aten::clone, {root});  // the undoing is a view, and a root is none
  }
  const std::vector<Value*> views = insert_views(graph, target, root);
  writer->output()->replaceAllUsesWith(views.empty() ? root : views.front());
  Block* block = writer->owningBlock();
  for (size_t i = 0; i < target.views.size(); ++i) {
    replace_inside(block, target.views[i], writer, views[i]);
  }
  replace_inside(block, target.root, writer, root);
  Node* before = writer;
  for (Node* branch : branches) {
    for (Block* side : branch->blocks()) {
      const bool writes = side == before->owningBlock();
      side->registerOutput(writes ? root : target.root);
    }
    root = branch->addOutput()->setType(c10::TensorType::get());
    replace_inside(branch->owningBlock(), target.root, branch, root);
    before = branch;
  }
}

// Removes the first write that can be removed; false when there is none.
bool remove_one(const std::shared_ptr<Graph>& graph, std::set<const Node*>& kept) {
  std::vector<Node*> writers;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_writer(node) && node->kind().is_aten() && node->outputs().size() == 1 && is_tensor(node->output()) &&
        !kept.count(node)) {
      writers.push_back(node);
    }
  });
  if (writers.empty()) {
    return false;
  }
  const SharedMemory memory(graph);
  const std::vector<Value*> values = all_values(graph->block());
  for (Node* writer : writers) {
    const Target target = target_of(writer->input(0));
    std::vector<Node*> branches;
    const bool removable = is_made_here(target.root, memory.aliases()) &&
                           branches_between(writer, target.root, branches) &&
                           is_hidden(writer, target, branches, memory, values);
    Value* written = nullptr;
    if (removable) {
      WithInsertPoint guard(writer);
      written = insert_functional(*graph, writer);
      if (written) {
        rewrite(*graph, writer, target, branches, written);
      }
    }
    if (written) {
      writer->destroy();
      return true;
    }
    kept.insert(writer);
  }
  return false;
}

}  // namespace

void remove_writes(const std::shared_ptr<Graph>& graph) {
  std::set<const Node*> kept;
  while (remove_one(graph, kept)) {
  }
}

}  // namespace torchgraft
