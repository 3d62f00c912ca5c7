#include <torchgraft/patch/canonicalise/fold_attributes.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>

#include <set>
#include <string>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;

// Names that any method of `module` or of its submodules assigns.
std::set<std::string> assigned_names(const Module& module) {
  std::set<std::string> names = {"training"};
  for (const Module& inner : module.modules()) {
    for (torch::jit::Function* method : inner.type()->methods()) {
      auto* function = torch::jit::tryToGraphFunction(*method);
      if (!function) {
        continue;
      }
      for_each_node(function->graph()->block(), [&](Node* node) {
        if (node->kind() == c10::prim::SetAttr) {
          names.insert(node->s(c10::attr::name));
        }
      });
    }
  }
  return names;
}

bool is_plain(const c10::IValue& value) {
  return value.isInt() || value.isDouble() || value.isBool() || value.isString() || value.isNone();
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
    std::string after = graph->toString(/*print_source_locations=*/false);
    if (after == before) {
      break;
    }
    before = std::move(after);
  }
}

void fold_attributes(const std::shared_ptr<Graph>& graph, const Module& module) {
  const std::set<std::string> assigned = assigned_names(module);
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() != c10::prim::GetAttr || assigned.count(node->s(c10::attr::name))) {
      return;
    }
    const auto attribute = resolve_attribute(node->output(), module);
    if (!attribute || !is_plain(attribute->value)) {
      return;
    }
    torch::jit::WithInsertPoint guard(node);
    node->output()->replaceAllUsesWith(graph->insertConstant(attribute->value));
  });
  simplify(graph);
}

}  // namespace torchgraft
