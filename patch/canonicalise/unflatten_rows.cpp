#include <torchgraft/patch/canonicalise/unflatten_rows.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool is_view(const Node* node) { return is_aten(node, {"view", "reshape", "_unsafe_view"}); }

// A norm over the features.
bool is_norm_of_rows(const Node* node) {
  if (!is_aten(node, {"layer_norm", "rms_norm"})) {
    return false;
  }
  const Value* shape = node->namedInput("normalized_shape");
  const auto sizes = resolve_constant(shape);
  return (sizes && sizes->isIntList() && sizes->toIntVector().size() == 1) ||
         (shape->node()->kind() == c10::prim::ListConstruct && shape->node()->inputs().size() == 1);
}

// Whether `node` computes each element, or row, from that one alone, whatever the leading dimensions are.
bool works_by_row(const Node* node) {
  return is_norm_of_rows(node) || is_elementwise(node) || is_aten(node, {"mul", "div", "add", "sub"});
}

// A value [rows, features] without its flattening: `tokens` is [..., features]. `source` is the value that the model
// has flattened: it has the leading dimensions.
struct Unflattened {
  Value* tokens = nullptr;
  Value* source = nullptr;
};

// Destroys no node before the end, because shapes are kept by value.
class RowUnflattening {
 public:
  RowUnflattening(const std::shared_ptr<Graph>& graph, const Module& module)
      : graph_(graph), shapes_(module), writes_(graph) {}

  void visit(Node* node);
  void flatten_for_other_readers();

 private:
  bool flattens_rows(const Node* view);
  void visit_linear(Node* linear);
  void visit_step(Node* node);
  void visit_view(Node* view);
  bool fits_tokens(const Value* value, const Value* source);
  void replace(Node* node, Value* tokens, Value* source);

  std::shared_ptr<Graph> graph_;
  SymbolicShapes shapes_;
  Writes writes_;
  std::map<const Value*, Unflattened> flat_;
  std::vector<Value*> order_;        // the keys of flat_, in execution order
  std::set<const Node*> converted_;  // nodes whose results nothing needs any more
};

// Whether `view` puts rows one below the other: x.view(-1, features), where `features` is the last dimension of x.
bool RowUnflattening::flattens_rows(const Node* view) {
  const Value* x = view->namedInput("self");
  const auto flat = shapes_.shape(view->output());
  const auto shape = shapes_.shape(x);
  if (shape) {
    return flat && flat->size() == 2 && shape->size() > 2 && shape->back().is_constant() &&
           shape->back() == flat->back();
  }
  // When the shape of x is unknown: view(-1, x.size(-1)), which keeps the last dimension, whatever it is.
  const Node* sizes = view->inputs().size() > 1 ? view->input(1)->node() : nullptr;
  if (!sizes || sizes->kind() != c10::prim::ListConstruct || sizes->inputs().size() != 2) {
    return false;
  }
  const Node* last = sizes->input(1)->node();
  return is_aten(last, {"size"}) && last->inputs().size() == 2 && last->namedInput("self") == x &&
         constant_int(last->namedInput("dim")) == -1;
}

void RowUnflattening::replace(Node* node, Value* tokens, Value* source) {
  flat_[node->output()] = {tokens, source};
  order_.push_back(node->output());
  converted_.insert(node);
}

void RowUnflattening::visit_linear(Node* linear) {
  const auto known = flat_.find(linear_input(linear));
  const auto weight = shapes_.shape(linear_weight(linear));
  if (known == flat_.end() || !weight || weight->size() != 2 || !weight->front().is_constant()) {
    return;
  }
  Value* x = known->second.tokens;
  Value* source = known->second.source;
  torch::jit::WithInsertPoint guard(linear);
  const auto read = [&, input = linear_input(linear)](Value* value) { return value == input ? x : value; };
  Node* copy = graph_->insertNode(graph_->createClone(linear, read));
  copy->output()->setType(c10::TensorType::get());
  replace(linear, copy->output(), source);
}

// Whether an operand beside flattened rows fits the tokens too: it is flattened from the same `source`, or broadcasts
// along the features only.
bool RowUnflattening::fits_tokens(const Value* value, const Value* source) {
  if (!is_tensor(value)) {
    return true;
  }
  if (const auto known = flat_.find(value); known != flat_.end()) {
    return known->second.source == source;
  }
  const auto shape = shapes_.shape(value);
  return shape && shape->size() <= 1;
}

void RowUnflattening::visit_step(Node* node) {
  const auto first = std::find_if(node->inputs().begin(), node->inputs().end(),
                                  [&](const Value* input) { return flat_.count(input) > 0; });
  if (first == node->inputs().end()) {
    return;
  }
  Value* source = flat_.at(*first).source;
  const bool all_fit = std::all_of(node->inputs().begin(), node->inputs().end(),
                                   [&](const Value* input) { return fits_tokens(input, source); });
  if (is_in_place(node) || !all_fit) {
    return;
  }
  torch::jit::WithInsertPoint guard(node);
  Node* copy = graph_->createClone(node, [&](Value* input) {
    const auto known = flat_.find(input);
    return known != flat_.end() ? known->second.tokens : input;
  });
  graph_->insertNode(copy);
  copy->output()->setType(c10::TensorType::get());
  replace(node, copy->output(), source);
}

// Removes a view that gives the rows their leading dimensions back; any other becomes a view of the tokens.
void RowUnflattening::visit_view(Node* view) {
  const auto known = flat_.find(view->namedInput("self"));
  if (known == flat_.end()) {
    // What follows reads the tokens themselves, where a reshape may have copied them.
    if (flattens_rows(view) && !writes_.reach(view->namedInput("self"))) {
      flat_[view->output()] = {view->namedInput("self"), view->namedInput("self")};
    }
    return;
  }
  if (!is_view(view)) {  // flatten counts dimensions, and the tokens have more of them
    return;
  }
  const auto [tokens, source] = known->second;
  auto restored = shapes_.shape(source);
  const auto shape = shapes_.shape(view->output());
  const auto features = shapes_.shape(view->namedInput("self"));
  if (restored && features) {
    restored->back() = features->back();
  }
  if (restored && features && shape == restored) {
    view->output()->replaceAllUsesWith(tokens);
    converted_.insert(view);
  } else {
    view->replaceInput(0, tokens);
  }
}

void RowUnflattening::visit(Node* node) {
  if (is_linear(node)) {
    visit_linear(node);
  } else if (is_view(node) || is_aten(node, {"flatten"})) {
    visit_view(node);
  } else if (works_by_row(node) && node->outputs().size() == 1) {
    visit_step(node);
  }
}

// Gives readers that were not converted a view of the tokens.
void RowUnflattening::flatten_for_other_readers() {
  for (Value* value : order_) {
    const auto uses = value->uses();
    Value* rows = nullptr;
    for (const auto& use : uses) {
      if (converted_.count(use.user)) {
        continue;
      }
      if (!rows) {
        torch::jit::WithInsertPoint guard(value->node());
        Value* sizes = graph_->insertConstant(std::vector<int64_t>{-1, shapes_.shape(value)->back().factor});
        rows = graph_->insert(c10::aten::reshape, {flat_.at(value).tokens, sizes});
      }
      use.user->replaceInput(use.offset, rows);
    }
  }
}

}  // namespace

void unflatten_rows(const std::shared_ptr<Graph>& graph, const Module& module) {
  RowUnflattening pass(graph, module);
  std::vector<Node*> nodes(graph->nodes().begin(), graph->nodes().end());
  for (Node* node : nodes) {
    pass.visit(node);
  }
  pass.flatten_for_other_readers();
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
