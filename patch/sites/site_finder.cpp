#include <torchgraft/patch/sites/site_finder.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/sites/base_weight.h>

#include <algorithm>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool is_norm(const Node* node) { return is_aten(node, {"layer_norm", "rms_norm"}); }

SiteFinder::SiteFinder(const CanonicalGraph& canonical, const Module& module)
    : graph_(*canonical.graph), module_(module), shapes_(module), home_(graph_.block()) {
  for_each_node(graph_.block(), [&](Node* node) {
    if (is_aten(node, {"scaled_dot_product_attention"})) {
      for (const char* input : {"query", "key", "value"}) {
        for (Node* linear : nearest_linears(node->namedInput(input))) {
          attention_projections_.insert(linear);
        }
      }
    }
  });
  for_each_node(graph_.block(), [&](Node* node) {
    if (is_linear(node) && !attention_projections_.count(node)) {
      const WeightSource weight = weight_source(linear_weight(node), module_);
      if (!weight.is_computed()) {
        linears_elsewhere_[weight.identity()].push_back(node);
      }
    }
  });
}

std::string SiteFinder::path_of(const Node* linear) const {
  return module_path(weight_source(linear_weight(linear), module_));
}

bool SiteFinder::layout_of(Value* tokens, bool& sequence_first) {
  const auto shape = shapes_.shape(tokens);
  if (!shape || shape->size() != 3) {
    return false;
  }
  const Dim batch = shapes_.canonical(batch_);
  sequence_first = !((*shape)[0] == batch);
  return (!sequence_first || (*shape)[1] == batch) && !is_square(tokens);
}

bool SiteFinder::is_square(Value* tokens) {
  const auto shape = shapes_.shape(tokens);
  const Dim batch = shapes_.canonical(batch_);
  return shape && shape->size() == 3 && (*shape)[0] == batch && (*shape)[1] == batch && !(batch == number(1));
}

bool SiteFinder::result_is_sequence_first() {
  Value* result = graph_.outputs()[0];
  while (!is_tensor(result) && !result->node()->inputs().empty()) {  // a tuple, or a dict (its first input is a key)
    const auto inputs = result->node()->inputs();
    const auto first = std::find_if(inputs.begin(), inputs.end(), [](Value* input) { return is_tensor(input); });
    result = first == inputs.end() ? inputs[0] : *first;
  }
  bool sequence_first = false;
  return is_tensor(result) && layout_of(result, sequence_first) && sequence_first;
}

Projection SiteFinder::describe(const Node* linear) {
  Projection result;
  const auto shape = shapes_.shape(linear_weight(linear));
  if (shape && shape->size() == 2 && (*shape)[0].is_constant() && (*shape)[1].is_constant()) {
    result.out_features = (*shape)[0].factor;
    result.in_features = (*shape)[1].factor;
  }
  const WeightSource source = known_rows(linear_weight(linear), shapes_, module_);
  if (source.is_computed()) {
    result.out_features = 0;  // computed at run time
  }
  result.path = path_of(linear);
  result.offset = source.first_row.value_or(0);
  result.packed = !source.is_computed() && source.is_part;
  return result;
}

std::optional<LinearSite> SiteFinder::linear_behind(Value* value, bool through_any_op) {
  Node* found = nullptr;
  std::vector<Value*> frontier = {value};
  std::unordered_set<Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const auto& use : data_uses(frontier[i])) {
      Node* user = use.user;
      if (is_linear(user) && use.offset == 0) {
        if (found && found != user) {
          return std::nullopt;
        }
        found = user;
        continue;
      }
      const bool unpacks = user->kind() == c10::prim::ListUnpack;
      const bool passes = is_layout(user) || is_aten(user, {"dropout"}) || is_norm(user) ||
                          (through_any_op &&
                           (unpacks || (user->kind().is_aten() &&
                                        !is_aten(user, {"scaled_dot_product_attention", "matmul", "bmm", "softmax"}))));
      if (!passes) {
        return std::nullopt;
      }
      for (Value* output : user->outputs()) {
        if (seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  if (!found || !is_at_home(found)) {
    return std::nullopt;
  }
  LinearSite site{found};
  layout_of(linear_input(found), site.sequence_first);
  return site;
}

bool SiteFinder::is_scale(const Node* node, const Value* scaled) {
  if (!is_aten(node, {"mul", "div"}) || node->inputs().size() < 2) {
    return false;
  }
  Value* factor = const_cast<Value*>(node->input(node->input(0) == scaled ? 1 : 0));
  return constant_double(factor).has_value() || resolve_tensor(strip_layout(factor), module_).defined();
}

Node* SiteFinder::linear_at(const std::string& path, const std::string& what) {
  std::vector<Node*> found;
  std::set<std::string> near;
  const auto parent = [](const std::string& p) { return p.substr(0, p.find_last_of('.')); };
  for (Node* node : graph_.nodes()) {
    if (!is_linear(node)) {
      continue;
    }
    const std::string other = path_of(node);
    if (other == path) {
      found.push_back(node);
    } else if (parent(other) == parent(path) || parent(parent(other)) == parent(parent(path))) {
      near.insert(other);
    }
  }
  TORCH_CHECK(!found.empty(), what, ": the model has no linear map '", path, "'",
              near.empty() ? "" : "; nearby are: ", c10::Join(", ", near));
  TORCH_CHECK(found.size() == 1, what, ": the linear map '", path, "' runs ", found.size(),
              " times, and a path cannot name one of the runs; choose a linear map that runs once");
  return found.front();
}

}  // namespace torchgraft
