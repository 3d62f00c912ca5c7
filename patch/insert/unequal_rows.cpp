#include <torchgraft/patch/insert/unequal_rows.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

bool is_size_arithmetic(const Node* node) {
  return node->kind() == c10::prim::NumToTensor || node->kind() == c10::prim::ListConstruct ||
         is_aten(node, {"Int", "ScalarImplicit", "mul", "floordiv", "floor_divide", "__getitem__"});
}

// Ops that give a view, or a copy, with sizes that are an argument.
bool takes_sizes(const Node* node) { return is_aten(node, {"view", "reshape", "_unsafe_view", "expand"}); }

// Ops whose result at a position depends on the operands at this position alone.
bool is_pointwise(const Node* node) {
  return is_elementwise(node) || node->kind() == c10::prim::unchecked_cast ||
         is_aten(node, {"add", "sub", "rsub", "mul", "div", "where", "masked_fill", "maximum", "minimum", "zeros_like",
                        "ones_like", "full_like", "expand_as"});
}

bool is_permutation(const Node* node) {
  return is_aten(node, {"transpose", "swapaxes", "swapdims", "t", "numpy_T", "permute", "unsqueeze", "squeeze"});
}

// Reads a tensor for its form alone.
bool reads_form(const Node* node) {
  return node->kind() == c10::prim::dtype || node->kind() == c10::prim::device || node->kind() == c10::prim::is_cuda ||
         is_aten(node, {"dim", "is_floating_point"}) ||
         std::string_view(node->kind().toQualString()) == "prim::is_nested";
}

class UnequalWalk {
 public:
  UnequalWalk(Graph& graph, const Module& module, const UnequalRows& rows) : graph_(graph), shapes_(module) {
    Shape shape = shapes_.shape(rows.tokens).value_or(Shape{});
    if (shape.size() != 3) {
      shape = {shapes_.fresh(), shapes_.fresh(), number(rows.features)};
      shapes_.assume(rows.tokens, shape);
    }
    rows_ = shape[rows.sequence_first ? 1 : 0];
    tokens_ = shape[rows.sequence_first ? 0 : 1];
    flow_.insert(rows.tokens);
  }

  std::string run() {
    if (tokens_.is_constant() || tokens_.symbols.size() != 1 ||
        shapes_.canonical(tokens_) == shapes_.canonical(rows_)) {
      return "the number of tokens is not known apart from that of rows";
    }
    visit(graph_.block());
    return reason_;
  }

 private:
  void visit(Block* block) {
    for (Node* node : block->nodes()) {
      if (!reason_.empty()) {
        return;
      }
      const bool reads_tokens = reads(node, flow_);
      const bool reads_sizes = reads(node, sizes_);
      if (reads_tokens || reads_sizes) {
        visit_reader(node, reads_tokens);
      } else {
        visit_inner(node);
      }
    }
  }
  void visit_inner(Node* node) {
    for (Block* inner : node->blocks()) {
      visit(inner);
      for (size_t i = 0; i < inner->outputs().size(); ++i) {
        if (sizes_.count(inner->outputs()[i])) {
          refuse(node);
        }
        if (flow_.count(inner->outputs()[i])) {
          const Dim own = inner_of(inner->outputs()[i]);
          if (inner_.emplace(node->outputs().at(i), own).first->second != own) {
            refuse(node);
          }
          add(node, node->outputs().at(i));
        }
      }
    }
  }
  static bool reads(const Node* node, const std::unordered_set<const Value*>& set) {
    return std::any_of(node->inputs().begin(), node->inputs().end(),
                       [&](const Value* input) { return set.count(input) > 0; });
  }

  void visit_reader(Node* node, bool reads_tokens) {
    if (is_aten(node, {"size"}) && node->inputs().size() == 2) {
      return visit_size(node);
    }
    if (reads_form(node) || is_result(node)) {
      return;
    }
    if (!reads_tokens) {
      if (is_size_arithmetic(node)) {
        sizes_.insert(node->output());
      } else if (!takes_sizes(node) || sizes_.count(node->input(0))) {  // a mask may be reshaped to the tokens
        refuse(node);
      }
      return;
    }
    if (takes_form_of_tokens(node) || is_read_for_form(node)) {
      return;
    }
    for (size_t i = 0; i < node->inputs().size(); ++i) {
      const bool is_sizes = takes_sizes(node) && i == 1;
      // A trace has tensors of numbers, of sizes too.
      const bool is_known =
          !sizes_.count(node->input(i)) && (may_be_tensor(node->input(i)) || is_fixed(node->input(i)));
      if (!is_sizes && !flow_.count(node->input(i)) && !is_known) {
        return refuse(node);
      }
    }
    if (is_in_place(node) || !is_apart(node)) {
      return refuse(node);
    }
    const auto inputs = node->inputs();
    const auto inner =
        std::find_if(inputs.begin(), inputs.end(), [&](const Value* input) { return inner_.count(input); });
    for (Value* output : node->outputs()) {
      if (inner != inputs.end()) {
        inner_.emplace(output, inner_.at(*inner));
      }
      add(node, output);
    }
  }

  static bool may_be_tensor(const Value* value) { return value->type()->isSubtypeOf(*c10::OptionalType::ofTensor()); }

  // A tensor that is no token, in the dtype of tokens.
  bool takes_form_of_tokens(const Node* node) const {
    return is_aten(node, {"type_as", "to"}) && !flow_.count(node->input(0));
  }

  // Whether nothing but the dtype and the like of what the node gives is read: of scores, for their mask.
  static bool is_read_for_form(const Node* node) {
    return std::all_of(node->outputs().begin(), node->outputs().end(), [](const Value* output) {
      return std::all_of(output->uses().begin(), output->uses().end(), [](const Use& use) {
        return reads_form(use.user) ||
               (is_pointwise(use.user) && use.user->inputs().size() > 0 && is_read_for_form(use.user));
      });
    });
  }

  // Numbers, flags and the like that are constants, weights, or sizes without tokens, or follow from these.
  bool is_fixed(Value* value) {
    Node* node = value->node();
    if (sizes_.count(value) || flow_.count(value) || node->kind() == c10::prim::Loop) {
      return false;
    }
    for (Block* block : node->blocks()) {  // a dropout in training mode alone
      if (!is_fixed(block->outputs()[value->offset()])) {
        return false;
      }
    }
    if (node->kind() == c10::prim::Param) {
      return value == graph_.inputs()[0];
    }
    if (reads_form(node)) {
      return true;
    }
    if (is_aten(node, {"size"}) && node->inputs().size() == 2) {
      return shapes_.integer(value).is_constant();
    }
    return std::all_of(node->inputs().begin(), node->inputs().end(), [&](Value* input) { return is_fixed(input); });
  }

  void visit_size(Node* node) {
    const auto shape = shapes_.shape(node->input(0));
    const auto dim = shape ? position(node->input(1), shape->size()) : std::nullopt;
    if (!dim) {
      return refuse(node);
    }
    if (has_tokens((*shape)[*dim])) {
      sizes_.insert(node->output());
    }
  }

  static bool is_result(const Node* node) {
    const bool packs = node->kind() == c10::prim::TupleConstruct || node->kind() == c10::prim::ListConstruct ||
                       node->kind() == c10::prim::DictConstruct;
    return packs && std::all_of(node->output()->uses().begin(), node->output()->uses().end(), [](const Use& use) {
             return (use.user->kind() == c10::prim::Return && !use.user->owningBlock()->owningNode()) ||
                    is_result(use.user);
           });
  }

  // Whether each token of the node's result depends on the same token of its operands alone, or on what no filler can
  // be in.
  bool is_apart(Node* node) {
    if (is_aten(node, {"scaled_dot_product_attention"})) {
      return is_known_attention(node);
    }
    if (is_linear(node)) {
      return flow_.count(node->input(0)) && !flow_.count(node->input(1)) && !last_has_tokens(node->input(0), 1);
    }
    if (is_aten(node, {"addmm"})) {
      return flow_.count(node->input(1)) && !flow_.count(node->input(0)) && !flow_.count(node->input(2)) &&
             !last_has_tokens(node->input(1), 1);
    }
    if (is_aten(node, {"matmul"})) {
      const auto weight = flow_.count(node->input(1)) ? std::nullopt : shapes_.shape(node->input(1));
      return weight && weight->size() == 2 && !last_has_tokens(node->input(0), 1);
    }
    if (is_aten(node, {"layer_norm", "rms_norm"})) {
      const auto normalised = shapes_.integers(node->namedInput("normalized_shape"));
      return normalised && !last_has_tokens(node->input(0), normalised->size());
    }
    if (is_softmax(node) || is_aten(node, {"log_softmax"})) {
      return is_along_others(node);
    }
    if (is_aten(node, {"mean", "sum"}) && node->inputs().size() > 2) {
      const auto shape = shapes_.shape(node->input(0));
      const auto dims = shapes_.integers(node->namedInput("dim"));
      return shape && dims && dims->size() == 1 && dims->front().is_constant() && dims->front().factor == -1 &&
             !has_tokens(shape->back());
    }
    if (is_aten(node, {"select"})) {
      const auto shape = shapes_.shape(node->input(0));
      const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
      return dim && (!has_tokens((*shape)[*dim]) ||
                     ((*shape)[*dim] == shapes_.canonical(tokens_) && constant_int(node->namedInput("index")) == 0));
    }
    if (is_aten(node, {"slice", "chunk", "split", "split_with_sizes", "unbind"})) {
      return is_whole_slice(node) || is_along_others(node);
    }
    if (node->kind() == c10::prim::ListUnpack) {
      return flow_.count(node->input());
    }
    if (takes_sizes(node) || is_aten(node, {"flatten", "unflatten"})) {
      return keeps_tokens(node);
    }
    return is_pointwise(node) ? is_aligned(node) : is_permutation(node);
  }

  bool is_known_attention(Node* node) {
    for (const char* name : {"query", "key", "value"}) {
      Value* value = node->namedInput(name);
      const auto shape = shapes_.shape(value);
      if (!flow_.count(value) || !shape || shape->size() != 4 || (*shape)[0] != shapes_.canonical(rows_) ||
          (*shape)[2] != shapes_.canonical(tokens_)) {
        return false;
      }
    }
    return !flow_.count(node->namedInput("attn_mask"));
  }

  bool has_tokens(const Dim& dim) const {
    const int tokens = shapes_.canonical(tokens_).symbols.front();
    return std::count(dim.symbols.begin(), dim.symbols.end(), tokens) > 0;
  }
  // Whether there are tokens in the last `count` dimensions, as far as is known.
  bool last_has_tokens(Value* value, size_t count) {
    const auto shape = shapes_.shape(value);
    return !shape || shape->size() < count ||
           std::any_of(
               shape->end() - static_cast<int64_t>(count), shape->end(),
               [&](const Dim& dim) { return has_tokens(dim); });
  }
  bool is_along_others(Node* node) {
    const auto shape = shapes_.shape(node->input(0));
    const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
    return dim && !has_tokens((*shape)[*dim]);
  }

  // The only dimension that has tokens; nullopt where there is none, or more than one, or an unknown shape.
  std::optional<size_t> tokens_dim(const Shape& shape) const {
    std::optional<size_t> found;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (has_tokens(shape[i])) {
        if (found) {
          return std::nullopt;
        }
        found = i;
      }
    }
    return found;
  }

  // Whether a view leaves one token's numbers together, in their order.
  bool keeps_tokens(Node* node) {
    const auto from = shapes_.shape(node->input(0));
    const auto to = shapes_.shape(node->output());
    if (!from || !to) {
      return false;
    }
    const bool had_tokens = std::any_of(from->begin(), from->end(), [&](const Dim& dim) { return has_tokens(dim); });
    const auto before = tokens_dim(*from);
    const auto after = tokens_dim(*to);
    if (!had_tokens) {
      return !after;
    }
    if (!before || !after) {
      return false;
    }
    if (is_aten(node, {"expand"})) {
      return to->size() - *after == from->size() - *before && (*to)[*after] == (*from)[*before];
    }
    const Dim behind_before = product(Shape(from->begin() + static_cast<int64_t>(*before) + 1, from->end()));
    const Dim behind_after = product(Shape(to->begin() + static_cast<int64_t>(*after) + 1, to->end()));
    const Dim step = shapes_.canonical(behind_before * inner_of(node->input(0)));
    const auto inner = step.divided_by(shapes_.canonical(behind_after));
    if (!inner || !(*to)[*after].divided_by(shapes_.canonical(tokens_ * *inner))) {
      return false;
    }
    inner_[node->output()] = *inner;
    return true;
  }

  // How many elements of its dimension one token has: 1 in [B * T], B in [T * B].
  Dim inner_of(const Value* value) const {
    const auto found = inner_.find(value);
    return found == inner_.end() ? Dim{} : found->second;
  }

  // Whether operands that have tokens have them in one place, as broadcasting sees it.
  bool is_aligned(Node* node) {
    std::optional<std::tuple<size_t, Dim, Dim>> place;
    for (Value* input : node->inputs()) {
      if (!flow_.count(input)) {
        continue;
      }
      const auto shape = shapes_.shape(input);
      if (!shape) {
        return false;
      }
      const auto dim = tokens_dim(*shape);
      if (!dim) {
        if (std::any_of(shape->begin(), shape->end(), [&](const Dim& size) { return has_tokens(size); })) {
          return false;
        }
        continue;
      }
      const auto own = std::tuple(shape->size() - *dim, (*shape)[*dim], inner_of(input));
      if (place && *place != own) {
        return false;
      }
      place = own;
    }
    return true;
  }

  void add(Node* node, Value* value) {
    flow_.insert(value);
    if (is_tensor(value) && !shapes_.shape(value)) {
      refuse(node);
    }
  }
  void refuse(Node* node) {
    if (reason_.empty()) {
      reason_ = "tokens may read each other, or their number, at " + described(node);
    }
  }

  Graph& graph_;
  SymbolicShapes shapes_;
  Dim rows_, tokens_;
  std::unordered_set<const Value*> flow_;   // what is computed from the tokens
  std::unordered_set<const Value*> sizes_;  // sizes that the number of tokens is a factor of
  std::map<const Value*, Dim> inner_;       // inner_of() where it is not 1
  std::string reason_;
};

}  // namespace

std::string why_not_unequal(Graph& graph, const Module& module, const UnequalRows& rows) {
  return UnequalWalk(graph, module, rows).run();
}

}  // namespace torchgraft
