#include <torchgraft/patch/canonicalise/fold_attributes.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/module_methods.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// Names that any method of `module` or of its submodules assigns.
std::set<std::string> assigned_names(const Module& module) {
  std::set<std::string> names = {"training"};
  for_each_method(module, [&](const std::string&, const std::shared_ptr<Graph>& graph) {
    for_each_node(graph->block(), [&](Node* node) {
      if (node->kind() == c10::prim::SetAttr) {
        names.insert(node->s(c10::attr::name));
      }
    });
  });
  return names;
}

bool is_plain(const c10::IValue& value) {
  return value.isInt() || value.isDouble() || value.isBool() || value.isString() || value.isNone();
}

bool has_attention(Block* block) {
  bool result = false;
  for_each_node(block,
                [&](Node* node) { result = result || is_aten(node, {"softmax", "scaled_dot_product_attention"}); });
  return result;
}

// True when `flag`, perhaps negated and combined with others, is the condition of a branch with an attention.
bool decides_attention(const Value* flag) {
  return std::any_of(flag->uses().begin(), flag->uses().end(), [](const torch::jit::Use& use) {
    Node* user = use.user;
    if (is_aten(user, {"__not__", "__and__", "__or__"})) {
      return decides_attention(user->output());
    }
    if (user->kind() != c10::prim::If) {
      return false;
    }
    return std::any_of(user->blocks().begin(), user->blocks().end(), has_attention) ||
           std::any_of(user->outputs().begin(), user->outputs().end(), [](const Value* output) {
             return output->type()->kind() == c10::TypeKind::BoolType && decides_attention(output);
           });
  });
}

// Removes questions about the thread's state that nobody reads the answers of. PyTorch takes them for effects, and
// keeps all that leads to them: the reasons why an nn.TransformerEncoderLayer does not run its fused kernel.
void drop_unread_questions(Graph& graph) {
  std::vector<Node*> unread;
  for_each_node(graph.block(), [&](Node* node) {
    const bool asks = is_aten(node, {"is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"});
    if (asks && node->output()->uses().empty()) {
      unread.push_back(node);
    }
  });
  for (Node* node : unread) {
    node->destroy();
  }
}

// The value that `value` is, perhaps known there not to be None.
Value* without_refinement(Value* value) {
  while (value->node()->kind() == c10::prim::unchecked_cast ||
         value->node()->kind() == c10::prim::unchecked_unwrap_optional) {
    value = value->node()->input();
  }
  return value;
}

// Replaces results of branches that are one value on both sides by that value, inner branches first.
void merge_equal_results(Block* block) {
  for (Node* node : block->nodes()) {
    for (Block* inner : node->blocks()) {
      merge_equal_results(inner);
    }
    if (node->kind() != c10::prim::If) {
      continue;
    }
    for (size_t i = 0; i < node->outputs().size(); ++i) {
      Value* value = without_refinement(node->blocks()[0]->outputs()[i]);
      const bool is_one = value == without_refinement(node->blocks()[1]->outputs()[i]);
      if (is_one && *value->type() == *node->outputs()[i]->type()) {
        node->outputs()[i]->replaceAllUsesWith(value);
      }
    }
  }
}

// Replaces the attributes that are read and that `folds` by constants, and simplifies.
std::vector<ModuleAttribute> fold(const std::shared_ptr<Graph>& graph, const Module& module,
                                  const std::function<bool(Node*, const c10::IValue&)>& folds) {
  std::map<std::string, c10::IValue> folded;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() != c10::prim::GetAttr || node->output()->uses().empty()) {
      return;
    }
    const auto attribute = resolve_attribute(node->output(), module);
    if (!attribute || !folds(node, attribute->value)) {
      return;
    }
    torch::jit::WithInsertPoint guard(node);
    node->output()->replaceAllUsesWith(graph->insertConstant(attribute->value));
    folded.emplace(attribute->path, attribute->value);
  });
  if (!folded.empty()) {
    simplify(graph);
  }
  std::vector<ModuleAttribute> result;
  for (const auto& [path, value] : folded) {
    result.push_back({path, value});
  }
  return result;
}

}  // namespace

void simplify(std::shared_ptr<Graph> graph) {
  constexpr int kMaxRounds = 8;
  std::string before;
  for (int round = 0; round < kMaxRounds; ++round) {
    torch::jit::LowerSimpleTuples(graph);
    torch::jit::ConstantPropagation(graph);
    torch::jit::PeepholeOptimize(graph, /*disable_shape_peephole=*/true);
    torch::jit::EliminateCommonSubexpression(graph);
    torch::jit::EliminateDeadCode(graph);
    drop_unread_questions(*graph);
    merge_equal_results(graph->block());
    std::string after = graph->toString(/*print_source_locations=*/false);
    if (after == before) {
      break;
    }
    before = std::move(after);
  }
}

std::vector<ModuleAttribute> fold_attributes(const std::shared_ptr<Graph>& graph, const Module& module) {
  const std::set<std::string> assigned = assigned_names(module);
  return fold(graph, module, [&](Node* node, const c10::IValue& value) {
    return !assigned.count(node->s(c10::attr::name)) && is_plain(value);
  });
}

std::vector<ModuleAttribute> fold_training(const std::shared_ptr<Graph>& graph, const Module& module) {
  return fold(graph, module, [&](Node* node, const c10::IValue& value) {
    return node->s(c10::attr::name) == "training" && value.isBool() && !value.toBool() &&
           decides_attention(node->output());
  });
}

}  // namespace torchgraft
