#include <torchgraft/patch/graph/writes.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::ValueSet;

namespace {

bool holds_tensors(const c10::Type& type) {
  const auto contained = type.containedTypes();
  return type.isSubtypeOf(*c10::TensorType::get()) ||
         std::any_of(contained.begin(), contained.end(),
                     [](const c10::TypePtr& element) { return holds_tensors(*element); });
}

// The operands that a node that may_return_operand may return: type_as asks the second for its dtype only. Numbers are
// left out: one constant stands in many nodes, which share no memory by it.
std::vector<const Value*> returnable(const Node* node) {
  std::vector<const Value*> result;
  const auto operands = is_aten(node, {"type_as"}) ? node->inputs().slice(0, 1) : node->inputs();
  std::copy_if(operands.begin(), operands.end(), std::back_inserter(result),
               [](const Value* operand) { return holds_tensors(*operand->type()); });
  return result;
}

// True when one of the arguments `names` of `node` is false for certain.
bool is_switched_off(const Node* node, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* name) {
    const auto index = node->schema().argumentIndexWithName(name);
    const auto constant = index ? resolve_constant(node->input(*index)) : std::nullopt;
    return constant && constant->isBool() && !constant->toBool();
  });
}

// True for a node that puts something into a list or a dict, or takes something out. That changes no tensor.
bool changes_container(const Node* node) {
  return !node->inputs().empty() && !is_tensor(node->input(0)) &&
         is_aten(node, {"_set_item", "append", "extend", "insert", "pop", "popitem", "remove", "clear", "Delete",
                        "reverse", "update", "setdefault"});
}

// True for a norm that updates the running statistics it is given.
bool updates_statistics(const Node* node) {
  const std::string kind = node->kind().toQualString();
  return kind.find("_norm") != std::string::npos && node->schema().argumentIndexWithName("running_mean") &&
         !is_switched_off(node, {"training", "train", "use_input_stats"});
}

// The loops that `node` stands in, the innermost first.
std::vector<Node*> loops_around(const Node* node) {
  std::vector<Node*> loops;
  for (Node* owner = const_cast<Node*>(node)->owningBlock()->owningNode(); owner;
       owner = owner->owningBlock()->owningNode()) {
    if (owner->kind() != c10::prim::If) {
      loops.push_back(owner);
    }
  }
  return loops;
}

// The tensors that `writer` may write into. In a loop, these may be any that one round hands to the next: AliasDb does
// not know that a later round reads them under another name.
std::vector<Value*> written_tensors(const Node* writer) {
  if (changes_container(writer)) {
    return {};
  }
  std::vector<Value*> result = written_inputs(writer);
  for (Node* loop : loops_around(writer)) {
    for (const auto& values : {loop->inputs(), loop->blocks()[0]->inputs(), loop->blocks()[0]->outputs()}) {
      std::copy_if(values.begin(), values.end(), std::back_inserter(result),
                   [](const Value* value) { return holds_tensors(*value->type()); });
    }
  }
  return result;
}

// The node that allocated the memory of `value`, or older memory of which `value` may be a copy; null where it is not
// known, or where the node runs more than once. What was there before the node ran does not share this memory.
const Node* allocator_of(Value* value) {
  const auto continues = [](const Node* node) {
    return is_layout(node) || is_in_place(node) || is_aten(node, {"slice", "narrow", "select", "expand"});
  };
  while (continues(value->node())) {
    value = value->node()->input(0);
  }
  const Node* node = value->node();
  const auto* schema = node->maybeSchema();
  if (!schema || !node->kind().is_aten() || may_return_operand(node) || !loops_around(node).empty()) {
    return nullptr;
  }
  const auto shares = [](const c10::Argument& result) { return result.alias_info() != nullptr; };
  return std::any_of(schema->returns().begin(), schema->returns().end(), shares) ? nullptr : node;
}

// A list or dict may get the memory later.
bool is_older(const Value* value, const Node* allocator) {
  return allocator && is_tensor(value) && value->node()->isBefore(allocator);
}

}  // namespace

std::vector<Value*> written_inputs(const Node* node) {
  std::vector<Value*> result;
  const auto* schema = node->maybeSchema();
  if (!schema) {
    return result;
  }
  const bool keeps_statistics = updates_statistics(node);
  for (size_t i = 0; i < schema->arguments().size(); ++i) {
    const c10::Argument& argument = schema->arguments()[i];
    const bool is_said = argument.alias_info() && argument.alias_info()->isWrite();
    const bool is_statistic = argument.name().starts_with("running_") && !is_none(node->input(i));
    if (is_said || (keeps_statistics && is_statistic)) {
      result.push_back(const_cast<Value*>(node->input(i)));
    }
  }
  return result;
}

bool changes_given_container(const Node* node) {
  const auto inputs = written_inputs(node);
  return std::any_of(inputs.begin(), inputs.end(), [](const Value* input) {
    const auto kind = input->type()->kind();
    const auto maker = input->node()->kind();
    const bool is_new = maker == c10::prim::ListConstruct || maker == c10::prim::DictConstruct;
    return (kind == c10::TypeKind::ListType || kind == c10::TypeKind::DictType) && !is_new;
  });
}

bool is_writer(const Node* node) { return !written_inputs(node).empty(); }

bool draws_random_numbers(const Node* node) {
  const auto* schema = node->maybeSchema();
  if (!schema) {
    return false;
  }
  if (const auto index = schema->argumentIndexWithName("dropout_p")) {
    return constant_double(node->input(*index)) != 0.0;
  }
  if (is_switched_off(node, {"train", "training"})) {
    return false;
  }
  const auto draws = [](const c10::Argument& argument) {
    return argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()));
  };
  const bool drops = schema->name().find("dropout") != std::string::npos || schema->argumentIndexWithName("dropout");
  return node->isNondeterministic() || drops ||
         std::any_of(schema->arguments().begin(), schema->arguments().end(), draws);
}

bool only_complains(const Node* node) { return node->kind() == c10::prim::RaiseException || is_aten(node, {"warn"}); }

bool must_run_once(const Node* node) {
  if (!node->blocks().empty()) {
    return std::any_of(node->blocks().begin(), node->blocks().end(), [](const Block* block) {
      return std::any_of(block->nodes().begin(), block->nodes().end(), must_run_once);
    });
  }
  return !only_complains(node) && (is_writer(node) || node->hasSideEffects() || node->isNondeterministic());
}

std::string described(const Node* node) {
  std::string result = node->kind().toQualString();
  if (const auto position = node->sourceRange().file_line_col()) {
    result += " at " + std::get<0>(*position) + ":" + std::to_string(std::get<1>(*position));
  }
  return result;
}

std::string maker_of(Value* value) {
  Node* node = strip_layout(value)->node();
  return node == value->owningGraph()->param_node() ? "forward's caller" : described(node);
}

bool may_return_operand(const Node* node) {
  const auto* schema = node->maybeSchema();
  if (!schema || !node->kind().is_aten() || is_in_place(node)) {
    return false;
  }
  const bool promises = std::any_of(schema->returns().begin(), schema->returns().end(),
                                    [](const c10::Argument& result) { return !result.alias_info(); });
  // Composed operators that always compute.
  const bool computes = is_aten(node, {"matmul",   "linear",      "layer_norm",
                                       "softmax",  "log_softmax", "where",
                                       "conv1d",   "conv2d",      "scaled_dot_product_attention",
                                       "rsub",     "divide",      "multiply",
                                       "subtract", "true_divide", "embedding",
                                       "rms_norm", "silu",        "square",
                                       "index",    "index_put"});
  if (!promises || computes || returnable(node).empty()) {
    return false;
  }
  const auto handle = c10::Dispatcher::singleton().findSchema(schema->operator_name());
  return !handle || handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

SharedMemory::SharedMemory(const std::shared_ptr<Graph>& graph) : aliases_(graph) {
  for_each_node(graph->block(), [&](Node* node) {
    const bool gives_tensors = std::any_of(node->outputs().begin(), node->outputs().end(),
                                           [](const Value* output) { return holds_tensors(*output->type()); });
    if (gives_tensors && may_return_operand(node)) {
      returning_.push_back(node);
    }
  });
}

ValueSet SharedMemory::connected(ValueSet values) const {
  std::vector<Node*> left = returning_;
  for (bool grows = true; grows;) {
    const auto is_connected = [&](const Node* node) {
      const auto shares = [&](const Value* value) {
        return std::any_of(values.begin(), values.end(), [&](const Value* other) {
          return other == value || aliases_.mayContainAlias(const_cast<Value*>(value), const_cast<Value*>(other));
        });
      };
      const auto operands = returnable(node);
      return std::any_of(operands.begin(), operands.end(), shares) ||
             std::any_of(node->outputs().begin(), node->outputs().end(), shares);
    };
    const auto rest = std::partition(left.begin(), left.end(), [&](Node* node) { return !is_connected(node); });
    grows = rest != left.end();
    for (auto node = rest; node != left.end(); ++node) {
      const auto operands = returnable(*node);
      values.insert(operands.begin(), operands.end());
      values.insert((*node)->outputs().begin(), (*node)->outputs().end());
    }
    left.erase(rest, left.end());
  }
  return values;
}

Writes::Writes(const std::shared_ptr<Graph>& graph) {
  for_each_node(graph->block(), [&](Node* node) {
    if (is_writer(node)) {
      writers_.push_back(node);
    }
  });
  if (writers_.empty()) {
    return;
  }
  memory_.emplace(graph);
  std::map<const Node*, ValueSet> written;  // by allocator; null: unknown
  ValueSet reached;
  for (const Node* writer : writers_) {
    for (Value* tensor : written_tensors(writer)) {
      written[allocator_of(tensor)].insert(tensor);
    }
    const auto loops = changes_container(writer) ? std::vector<Node*>() : loops_around(writer);
    if (!loops.empty()) {
      for_each_node(loops.back()->blocks()[0],
                    [&](Node* node) { reached.insert(node->outputs().begin(), node->outputs().end()); });
    }
  }
  const auto add_reached = [&](const Node* allocator, const ValueSet& shared, at::ArrayRef<Value*> values) {
    std::copy_if(values.begin(), values.end(), std::inserter(reached, reached.end()), [&](Value* value) {
      return !is_older(value, allocator) && std::any_of(shared.begin(), shared.end(), [&](const Value* other) {
        return other == value || memory_->aliases().mayContainAlias(value, const_cast<Value*>(other));
      });
    });
  };
  for (const auto& [allocator, inputs] : written) {
    const ValueSet shared = memory_->connected(inputs);
    add_reached(allocator, shared, graph->inputs());
    for_each_node(graph->block(), [&](Node* node) { add_reached(allocator, shared, node->outputs()); });
  }
  const auto add_untouched = [&](at::ArrayRef<Value*> values) {
    std::copy_if(values.begin(), values.end(), std::inserter(untouched_, untouched_.end()),
                 [&](const Value* value) { return !reached.count(value); });
  };
  add_untouched(graph->inputs());
  for_each_node(graph->block(), [&](Node* node) { add_untouched(node->outputs()); });
}

bool Writes::reach(const Value* value) const { return !writers_.empty() && !untouched_.count(value); }

Node* Writes::between(const Node* begin, const Node* end, const ValueSet& values) const {
  if (writers_.empty()) {
    return nullptr;
  }
  const ValueSet shared = memory_->connected(values);
  std::vector<Value*> read;
  std::transform(shared.begin(), shared.end(), std::back_inserter(read),
                 [](const Value* value) { return const_cast<Value*>(value); });
  std::vector<Value*> containers;
  std::copy_if(read.begin(), read.end(), std::back_inserter(containers),
               [](Value* value) { return !is_tensor(value); });
  const auto writes = [&](Node* writer) {
    if (changes_container(writer)) {
      return !containers.empty() && memory_->aliases().mayContainAlias(written_inputs(writer), containers);
    }
    const auto tensors = written_tensors(writer);
    const bool are_older = std::all_of(tensors.begin(), tensors.end(), [&](Value* tensor) {
      const Node* allocator = allocator_of(tensor);
      return std::all_of(values.begin(), values.end(), [&](const Value* value) { return is_older(value, allocator); });
    });
    return !are_older && (!loops_around(begin).empty() || memory_->aliases().writesToAlias(writer, shared) ||
                          memory_->aliases().mayContainAlias(tensors, read));
  };
  const auto found = std::find_if(writers_.begin(), writers_.end(), [&](Node* writer) {
    return writer != begin && writer->isAfter(begin) && writer->isBefore(end) && writes(writer);
  });
  return found == writers_.end() ? nullptr : *found;
}

}  // namespace torchgraft
