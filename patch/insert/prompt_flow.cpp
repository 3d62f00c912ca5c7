#include <torchgraft/patch/insert/prompt_flow.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

constexpr const char* kRemedy = "; train prefix_tuning instead, which needs no tokens";

bool is_attention(const Node* node) { return is_aten(node, {"scaled_dot_product_attention"}); }

// Sizes, and what a trace records between them.
bool is_size_arithmetic(const Node* node) {
  const auto kind = node->kind();
  return kind == c10::prim::NumToTensor || kind == c10::prim::ListConstruct ||
         is_aten(node, {"Int", "ScalarImplicit", "add", "sub", "mul", "neg", "floordiv", "floor_divide"});
}

bool is_size(const Node* node) { return is_aten(node, {"size"}) && node->inputs().size() == 2; }

// An operand whose dtype and device alone are read.
bool is_read_for_dtype(const Node* node, size_t input) {
  if (is_aten(node, {"type_as"})) {
    return input == 1;
  }
  return (is_aten(node, {"to"}) && input == 1) || node->kind() == c10::prim::dtype ||
         node->kind() == c10::prim::device;
}

// What leaves a mask a mask: 0 and True stay what they are.
bool keeps_mask(const Node* node) {
  return is_aten(node, {"slice", "to", "type_as", "expand", "contiguous", "alias", "detach"});
}

}  // namespace

PromptFlow::PromptFlow(Graph& graph, const GraphSites& sites, Node* begin, const torch::jit::Module& root)
    : graph_(graph), site_(sites.embeddings.value()), shapes_(root) {
  for (const Layer& layer : sites.structure.layers) {
    TORCH_CHECK(layer.kind == AttentionKind::kSelf, "graft: a prompt cannot be put before the embeddings of a model ",
                "with an encoder and a decoder", kRemedy);
    TORCH_CHECK(layer.cache == CacheKind::kNone, "graft: a prompt cannot be put before the embeddings of a model with ",
                "a cache of keys and values", kRemedy);
  }
  if (!shapes_.shape(site_.value)) {
    shapes_.assume(site_.value, {shapes_.fresh(), shapes_.fresh(), number(sites.structure.embedding_size)});
  }
  const Shape shape = shapes_.shape(site_.value).value();
  batch_ = shapes_.canonical(shape.at(site_.sequence_first ? 1 : 0));
  tokens_ = shapes_.canonical(shape.at(site_.sequence_first ? 0 : 1));
  TORCH_CHECK(!tokens_.is_constant(), "graft: a prompt cannot be put before embeddings of a constant number of tokens: ",
              maker_of(site_.value), kRemedy);
  flow_.insert(site_.value);
  collect(graph.block(), begin);
  for_each_node(graph.block(), [&](Node* node) {
    if (is_attention(node) && flow_.count(node->output())) {
      find_masks(node);
    }
  });
  check(graph.block(), begin);
}

bool PromptFlow::reads_flow(Node* node) const {
  const auto in_flow = [&](const Value* value) { return flow_.count(value) > 0; };
  if (std::any_of(node->inputs().begin(), node->inputs().end(), in_flow)) {
    return true;
  }
  for (Block* block : node->blocks()) {
    for (Node* inner : block->nodes()) {
      if (reads_flow(inner)) {
        return true;
      }
    }
    if (reads_flow(block->return_node())) {
      return true;
    }
  }
  return false;
}

void PromptFlow::collect(Block* block, Node* first) {
  for (Node* node = first; node != block->return_node(); node = node->next()) {
    if (!reads_flow(node)) {
      continue;
    }
    TORCH_CHECK(node->kind() != c10::prim::Loop, "graft: a prompt cannot be put before embeddings that a loop reads: ",
                described(node), kRemedy);
    for (Block* inner : node->blocks()) {
      flow_.insert(inner->inputs().begin(), inner->inputs().end());
      collect(inner, *inner->nodes().begin());
    }
    flow_.insert(node->outputs().begin(), node->outputs().end());
  }
}

// Walks back from what an attention adds to its scores to the masks that know nothing of the embeddings.
void PromptFlow::find_masks(Node* attention) {
  std::vector<Read> reads;
  for (size_t i = 0; i < attention->inputs().size(); ++i) {
    if (attention->input(i) == attention->namedInput("attn_mask")) {
      reads.emplace_back(attention, i);
    }
  }
  for (size_t i = 0; i < reads.size(); ++i) {
    const auto [node, input] = reads[i];
    Value* value = node->input(input);
    if (!flow_.count(value)) {
      if (std::find(masks_.begin(), masks_.end(), reads[i]) == masks_.end()) {
        masks_.push_back(reads[i]);
      }
    } else if (keeps_mask(value->node())) {
      reads.emplace_back(value->node(), 0);
    } else {
      TORCH_CHECK(false, "graft: a prompt cannot be put before the embeddings: ", described(value->node()),
                  " computes an attention mask, or what else is added to scores, from what comes behind them", kRemedy);
    }
  }
}

void PromptFlow::check(Block* block, Node* first) {
  const auto is_in_flow = [&](Node* node) {
    const bool has_flow = std::any_of(node->outputs().begin(), node->outputs().end(),
                                      [&](const Value* output) { return flow_.count(output) > 0; });
    return has_flow || reads_flow(node);
  };
  for (Node* node = first; node != block->return_node(); node = node->next()) {
    if (!is_in_flow(node)) {
      continue;
    }
    if (is_attention(node)) {
      check_attention(node);
    }
    for (size_t i = 0; i < node->inputs().size(); ++i) {
      check_read(node, i);
    }
    for (Block* inner : node->blocks()) {
      check(inner, *inner->nodes().begin());
      for (size_t i = 0; i < inner->return_node()->inputs().size(); ++i) {
        check_read(inner->return_node(), i);
      }
    }
  }
}

void PromptFlow::check_attention(Node* attention) {
  const auto causal = resolve_constant(attention->namedInput("is_causal"));
  TORCH_CHECK(causal && causal->isBool() && !causal->toBool(), "graft: a prompt cannot be put before the embeddings: ",
              described(attention), " is causal, or may be: the adapters library has no prompts for such models",
              kRemedy);
  for (const char* name : {"query", "key", "value"}) {
    Value* value = attention->namedInput(name);
    TORCH_CHECK(flow_.count(value), "graft: a prompt cannot be put before the embeddings: the ", name, " of ",
                described(attention), " is not computed from them", kRemedy);
    const auto shape = shapes_.shape(value);
    TORCH_CHECK(shape && shape->size() > 2 && !shapes_.canonical((*shape)[shape->size() - 2]).is_constant(),
                "graft: a prompt cannot be put before the embeddings: ", maker_of(value), " makes the ", name, " of ",
                described(attention), ", whose number of tokens is a constant or not known; trace the model with a ",
                "size that it reads from its input, or script it");
  }
}

// Constants, weights, and what is computed from them alone.
bool PromptFlow::is_fixed(Value* value) const {
  const Node* node = value->node();
  if (node->kind() == c10::prim::Param) {
    return node->owningBlock() == graph_.block() && value == graph_.inputs()[0];
  }
  return node->blocks().empty() && std::all_of(node->inputs().begin(), node->inputs().end(),
                                               [&](Value* input) { return is_fixed(input); });
}

// Whether arguments are optional, of which dtype they are and the like.
bool PromptFlow::is_without_sizes(Value* value) const {
  if (is_fixed(value)) {
    return true;
  }
  Node* node = value->node();
  if (node->kind() == c10::prim::dtype || node->kind() == c10::prim::device || is_aten(node, {"__is__", "__isnot__"}) ||
      node->kind() == c10::prim::is_cuda) {
    return true;
  }
  return is_aten(node, {"__not__", "__and__", "__or__", "eq", "ne"}) &&
         std::all_of(node->inputs().begin(), node->inputs().end(), [&](Value* input) { return is_without_sizes(input); });
}

// Whether `value` is made of sizes that are known: of batches, features and tokens.
bool PromptFlow::holds_sizes(Value* value) {
  Node* node = value->node();
  if (flow_.count(value) || is_fixed(value)) {
    return true;
  }
  if (is_size(node)) {
    const auto shape = shapes_.shape(node->input(0));
    const auto dim = shape ? position(node->input(1), shape->size()) : std::nullopt;
    const Dim size = dim ? shapes_.canonical((*shape)[*dim]) : Dim{};
    return dim && (size.is_constant() || size == batch_ || size == tokens_);
  }
  return is_size_arithmetic(node) && std::all_of(node->inputs().begin(), node->inputs().end(),
                                                 [&](Value* input) { return holds_sizes(input); });
}

void PromptFlow::check_read(Node* node, size_t input) {
  Value* value = node->input(input);
  const Read read{node, input};
  if (flow_.count(value) || is_fixed(value) || std::find(masks_.begin(), masks_.end(), read) != masks_.end()) {
    return;
  }
  if (is_read_for_dtype(node, input) && is_tensor(value)) {
    return;
  }
  if (holds_sizes(value)) {
    sizes_.push_back(read);
    return;
  }
  TORCH_CHECK(!is_tensor(value) && is_without_sizes(value), "graft: a prompt cannot be put before the embeddings: ",
              described(node), " reads ", maker_of(value), ", which knows the tokens without the prompt", kRemedy);
}

Value* PromptFlow::with_tokens(Value* value, Value* tokens) {
  Node* node = value->node();
  if (flow_.count(value) || is_fixed(value)) {
    return value;
  }
  if (is_size(node)) {
    const Shape shape = shapes_.shape(node->input(0)).value();
    const Dim size = shapes_.canonical(shape.at(position(node->input(1), shape.size()).value()));
    return size == tokens_ ? tokens : value;
  }
  Node* copy = graph_.insertNode(graph_.createClone(node, [&](Value* read) { return with_tokens(read, tokens); }));
  return copy->output();
}

void PromptFlow::replace_sizes(Value* tokens) {
  for (const auto& [node, input] : sizes_) {
    WithInsertPoint guard(node);
    node->replaceInput(input, with_tokens(node->input(input), tokens));
  }
}

}  // namespace torchgraft
