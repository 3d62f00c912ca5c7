#include <torchgraft/patch/insert/longer_tokens.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/insert/mask_uses.h>
#include <torchgraft/patch/insert/wider_masks.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

constexpr const char* kRemedy = "; train prefix_tuning instead";

[[noreturn]] void refuse(const Node* node, const std::string& why) {
  TORCH_CHECK(false, "graft: prompt_tuning cannot add tokens to this model: ", why, kRemedy, "; at ", described(node));
}

class Longer {
 public:
  Longer(Graph& graph, const Module& module, const LongerTokens& longer, const Value* adapter_ids)
      : graph_(graph), module_(module), shapes_(module), longer_(longer) {
    for (Value* input : graph.inputs()) {
      if (input != graph.inputs()[0] && input != adapter_ids) {
        of_arguments_.insert(input);
      }
    }
    Shape shape = shapes_.shape(longer.before).value_or(Shape{});
    if (shape.size() != 3) {
      shape = {shapes_.fresh(), shapes_.fresh(), number(longer.features)};
    }
    rows_ = shape[longer.sequence_first ? 1 : 0];
    tokens_ = shape[longer.sequence_first ? 0 : 1];
    shape[longer.sequence_first ? 0 : 1] = shapes_.fresh();
    shapes_.assume(longer.tokens, shape);
    longer_values_.insert(longer.tokens);
    own_ = longer.own;
    WithInsertPoint guard(longer.tokens->node());
    own_ = own_ ? own_ : graph.insertConstant(c10::IValue());
    tokens_before_ = graph.insert(c10::aten::size, {longer.before, longer.sequence_first ? 0 : 1});
  }

  void run() {
    visit(graph_.block());
    for (const auto& [node, input] : crossings_) {
      cross(node, input);
    }
    for (Node* attention : longer_.own ? attentions_ : std::vector<Node*>()) {
      show_own(attention);
    }
  }

 private:
  // Marks what depends on the longer tokens, and notes where something else meets it.
  void visit(Block* block) {
    for (Node* node : block->nodes()) {
      if (node == longer_.tokens->node() || node == longer_.lengths->node() || node == own_->node()) {
        continue;  // they follow the longer tokens
      }
      bool is_longer = false;
      bool is_of_arguments = false;
      for (Value* input : node->inputs()) {
        is_longer |= longer_values_.count(input) > 0 && !reads_form(node, input);
        is_of_arguments |= of_arguments_.count(input) > 0;
      }
      for (Block* inner : node->blocks()) {
        visit(inner);
        for (Value* output : inner->outputs()) {
          is_longer |= longer_values_.count(output) > 0;
          is_of_arguments |= of_arguments_.count(output) > 0;
        }
      }
      for (Value* output : node->outputs()) {
        if (is_longer) {
          longer_values_.insert(output);
        } else if (is_of_arguments) {
          of_arguments_.insert(output);
        }
      }
      learn_shape(node);
      if (is_longer && !is_result(node)) {
        check(node);
        for (size_t i = 0; i < node->inputs().size(); ++i) {
          if (is_foreign(node->input(i))) {
            crossings_.emplace_back(node, i);
          }
        }
      }
    }
  }

  // A dtype or a device, which more tokens leave as they are.
  static bool reads_form(const Node* node, const Value* input) {
    return node->kind() == c10::prim::dtype || node->kind() == c10::prim::device ||
           (is_aten(node, {"type_as", "to"}) && input != node->input(0));
  }

  // The result of an adapter's op has the shape of what it changes.
  void learn_shape(Node* node) {
    if (std::string_view(node->kind().ns().toUnqualString()) != "torchgraft" || !node->maybeSchema()) {
      return;
    }
    for (const char* changed : {"base", "residual", "query", "x"}) {
      if (node->schema().argumentIndexWithName(changed)) {
        if (const auto shape = shapes_.shape(node->namedInput(changed))) {
          shapes_.assume(node->output(0), *shape);
        }
        return;
      }
    }
  }

  // Whether the node packs what forward returns.
  static bool is_result(const Node* node) {
    const bool packs = node->kind() == c10::prim::TupleConstruct || node->kind() == c10::prim::ListConstruct ||
                       node->kind() == c10::prim::DictConstruct;
    return packs && std::all_of(node->output()->uses().begin(), node->output()->uses().end(), [](const Use& use) {
             return use.user->kind() == c10::prim::Return || is_result(use.user);
           });
  }
  bool is_foreign(Value* value) const { return of_arguments_.count(value) > 0 && longer_values_.count(value) == 0; }

  // That a node does not know the number of tokens, and shows the new ones to all.
  void check(Node* node) {
    if (node->kind() == c10::prim::Loop) {
      refuse(node, "a loop reads them");
    }
    if (is_attention(node)) {
      const auto causal = resolve_constant(node->namedInput("is_causal"));
      if (!causal || !causal->isBool() || causal->toBool()) {
        refuse(node, "an attention is causal, and not all tokens would see the prompt");
      }
      attentions_.push_back(node);
    } else if (is_aten(node, {"slice"})) {
      check_slice(node);
    } else if (is_aten(node, {"narrow"})) {
      check_dim(node, "dim", "it takes a fixed number of tokens");
    } else if (is_aten(node, {"view", "reshape"}) && node->inputs().size() == 2) {
      check_view(node);
    }
  }
  void check_dim(Node* node, const char* argument, const std::string& why) {
    const auto shape = shapes_.shape(node->input(0));
    const auto dim = shape ? position(node->namedInput(argument), shape->size()) : std::nullopt;
    if (!dim || !(*shape)[*dim].is_constant()) {
      refuse(node, why);
    }
  }
  void check_slice(Node* node) {
    const Value* end = node->namedInput("end");
    const auto last = constant_int(end);
    const bool is_open = is_none(end) || (last && (*last < 0 || *last >= std::numeric_limits<int32_t>::max()));
    if (!is_open || constant_int(node->namedInput("step")) != 1) {
      check_dim(node, "dim", "it takes a fixed number of tokens");
    }
  }

  // Where one size is left to be found, the others may leave it to take tokens of several rows for those of one.
  void check_view(Node* node) {
    const auto sizes = shapes_.integers(node->input(1));
    const auto shape = shapes_.shape(node->input(0));
    if (!sizes) {
      refuse(node, "the sizes of this view are not known");
    }
    int64_t known = 1;
    bool has_rest = false;
    for (const Dim& size : *sizes) {
      has_rest |= size == number(-1);
      known *= size.is_constant() && size.factor > 0 ? size.factor : 1;
    }
    if (has_rest && (!shape || product(*shape).factor % known != 0)) {
      refuse(node, "the number of tokens or rows may be a constant in this view");
    }
  }

  void cross(Node* node, size_t index) {
    Value* value = node->input(index);
    if (value->type()->isSubtypeOf(*c10::DeviceObjType::get()) || value->node()->kind() == c10::prim::dtype) {
      return;
    }
    if (node->kind() == c10::prim::If && index == 0 && is_aten(value->node(), {"__is__", "__isnot__"}) &&
        is_none(value->node()->input(1))) {
      return;
    }
    if (Value* size = longer_size(value, node)) {
      if (size != value) {
        node->replaceInput(index, size);
      }
      return;
    }
    if (value->type()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
      if (is_attention(node) && node->namedInput("attn_mask") == value && !is_of_weights(value, module_)) {
        widen(node, index, is_tensor(value) ? "wider_mask" : "wider_optional", std::nullopt);
        return;
      }
      return cross_mask(node, index);
    }
    refuse(node, "it reads %" + value->debugName() + ", which depends on forward's arguments");
  }

  // What stands for a size that is no tensor's content: `value` itself for the number of rows, the longer size for that
  // of tokens; null for others.
  Value* longer_size(Value* value, Node* user) {
    if (value->node()->kind() == c10::prim::ListConstruct && value->type()->isSubtypeOf(*c10::ListType::ofInts())) {
      std::vector<Value*> sizes;
      for (Value* element : value->node()->inputs()) {
        Value* size = is_foreign(element) ? longer_size(element, user) : element;
        if (!size) {
          return nullptr;
        }
        sizes.push_back(size);
      }
      if (at::ArrayRef<Value*>(sizes).equals(value->node()->inputs())) {
        return value;
      }
      WithInsertPoint guard(user);
      return graph_.insertNode(graph_.createList(c10::IntType::get(), sizes))->output();
    }
    Node* node = value->node();
    const bool is_number = node->kind() == c10::prim::NumToTensor;
    if (!is_number && !value->type()->isSubtypeOf(*c10::IntType::get())) {
      return nullptr;
    }
    const Dim dim = shapes_.canonical(shapes_.integer(is_number ? node->input() : value));
    if (dim == shapes_.canonical(rows_)) {
      return value;
    }
    if (is_number || !(dim == shapes_.canonical(tokens_))) {
      return nullptr;
    }
    WithInsertPoint guard(user);
    return graph_.insert(c10::aten::size, {longer_.tokens, longer_.sequence_first ? 0 : 1});
  }

  // A tensor that is no attention's mask yet: a mask on its way to it, or the place is refused.
  void cross_mask(Node* node, size_t index) {
    Value* value = node->input(index);
    if (!is_of_weights(value, module_)) {
      if (is_mask_cast(node) && index == 0) {
        if (cast_to_mask(node->output())) {
          return;
        }
      } else if (sets_scores(node, index)) {
        widen(node, index, "wider_flags", false);
        return;
      } else if (is_mask_reshape(node) && index == 0 && only_sets_scores(node->output())) {
        widen(node, index, "wider_flags", true);
        return;
      } else if (is_mask_reshape(node) && index == 0 && is_only_mask(node->output())) {
        widen(node, index, "wider_keys", true);
        return;
      }
    }
    refuse(node, "it reads the tensor %" + value->debugName() +
                     ", which depends on forward's arguments and is not an attention mask alone");
  }
  // Widens what is made of a mask by casts alone where attentions read it.
  bool cast_to_mask(Value* value) {
    std::vector<std::pair<Node*, size_t>> places;
    for (const Use& use : std::vector<Use>(value->uses().begin(), value->uses().end())) {
      if (is_mask_cast(use.user) && use.offset == 0) {
        if (!cast_to_mask(use.user->output())) {
          return false;
        }
      } else if (is_attention(use.user) && use.user->namedInput("attn_mask") == value) {
        places.emplace_back(use.user, use.offset);
      } else {
        return false;
      }
    }
    for (const auto& [user, offset] : places) {
      widen(user, offset, "wider_mask", std::nullopt);
    }
    return true;
  }

  void widen(Node* node, size_t index, const char* function, std::optional<bool> has_keys_only) {
    Value* mask = node->input(index);
    const bool is_top_level = node->owningBlock() == graph_.block();
    const auto key = std::pair(mask, std::pair(std::string(function), has_keys_only.value_or(false)));
    if (const auto found = widened_.find(key); found != widened_.end()) {
      node->replaceInput(index, found->second);
      return;
    }
    std::vector<Value*> arguments = {mask, tokens_before_, longer_.added, longer_.lengths, own_};
    WithInsertPoint guard(node);
    if (has_keys_only) {
      arguments.push_back(graph_.insertConstant(*has_keys_only));
    }
    Value* wide = torch::jit::insertGraph(graph_, *compile_graph(wider_mask_source(), function), arguments)[0];
    node->replaceInput(index, wide);
    if (is_top_level) {
      widened_[key] = wide;
    }
  }

  // Hides what is not a row's own from an attention whose queries are [B, heads, tokens, features].
  void show_own(Node* attention) {
    const size_t index = *attention->schema().argumentIndexWithName("attn_mask");
    Value* mask = attention->input(index);
    Value* own_mask = nullptr;
    Value*& shared = attention->owningBlock() == graph_.block() ? shown_[mask] : own_mask;
    if (!shared) {
      WithInsertPoint guard(attention);
      shared = torch::jit::insertGraph(graph_, *compile_graph(wider_mask_source(), "shown"), {mask, own_})[0];
    }
    attention->replaceInput(index, shared);
  }

  Graph& graph_;
  const Module& module_;
  SymbolicShapes shapes_;
  const LongerTokens& longer_;
  Value* own_ = nullptr;            // longer_.own, or None
  Value* tokens_before_ = nullptr;  // S, an int
  Dim rows_, tokens_;
  std::unordered_set<const Value*> longer_values_;
  std::unordered_set<const Value*> of_arguments_;
  std::vector<std::pair<Node*, size_t>> crossings_;
  std::vector<Node*> attentions_;
  std::map<const Value*, Value*> shown_;
  std::map<std::pair<const Value*, std::pair<std::string, bool>>, Value*> widened_;
};

}  // namespace

void make_longer(Graph& graph, const Module& module, const LongerTokens& longer, const Value* adapter_ids) {
  Longer(graph, module, longer, adapter_ids).run();
}

}  // namespace torchgraft
