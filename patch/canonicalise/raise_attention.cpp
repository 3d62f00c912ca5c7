#include <torchgraft/patch/canonicalise/raise_attention.h>

#include <torchgraft/patch/canonicalise/affine_path.h>
#include <torchgraft/patch/canonicalise/cached_tokens.h>
#include <torchgraft/patch/canonicalise/head_order.h>
#include <torchgraft/patch/canonicalise/mask_fills.h>
#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/canonicalise/score_path.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <optional>
#include <unordered_map>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// softmax -> [cast] -> [dropout] -> product with the values. `dropout` is null when there is none.
struct Consumer {
  Node* dropout = nullptr;
  Node* product = nullptr;
};

struct Attention {
  Node* softmax = nullptr;
  Node* product = nullptr;  // of queries and keys
  Consumer consumer;
};

std::optional<Consumer> find_consumer(Node* softmax, std::string& reason) {
  Consumer result;
  Value* current = softmax->output();
  while (true) {
    const auto uses = data_uses(current);
    if (uses.size() != 1) {
      reason = uses.empty() ? "its result is not used" : "the attention probabilities are used elsewhere too";
      return std::nullopt;
    }
    Node* user = uses[0].user;
    if (is_aten(user, {"matmul", "bmm"}) && uses[0].offset == 0) {
      result.product = user;
      return result;
    }
    if (is_aten(user, {"dropout"}) && !result.dropout) {
      result.dropout = user;
    } else if (!is_aten(user, {"to", "type_as", "contiguous"}) && !is_reshape(user)) {
      reason = "no product with values follows it";
      return std::nullopt;
    }
    current = user->output();
  }
}

Value* insert_dropout_p(Graph& graph, Node* dropout) {
  if (!dropout) {
    return graph.insertConstant(0.0);
  }
  Value* p = dropout->namedInput("p");
  Value* training = dropout->namedInput("train");
  if (const auto constant = torch::jit::toIValue(training)) {
    return constant->toBool() ? p : graph.insertConstant(0.0);
  }
  Value* on = graph.insert(c10::aten::Float, {training});
  return graph.insert(c10::aten::mul, {p, on});
}

Value* insert_transposed(Graph& graph, SymbolicShapes& shapes, Value* keys_transposed) {
  Node* node = keys_transposed->node();
  if (is_aten(node, {"transpose"})) {
    const auto a = constant_int(node->namedInput("dim0"));
    const auto b = constant_int(node->namedInput("dim1"));
    const auto shape = shapes.shape(node->namedInput("self"));
    const int64_t rank = shape ? static_cast<int64_t>(shape->size()) : 0;
    const auto from_the_end = [&](int64_t dim) { return dim >= 0 ? dim - rank : dim; };
    if (a && b && from_the_end(*a) + from_the_end(*b) == -3 && std::abs(from_the_end(*a) - from_the_end(*b)) == 1) {
      return node->namedInput("self");
    }
  }
  return graph.insert(c10::aten::transpose, {keys_transposed, -2, -1});
}

// Inserts [B * h, S, d], or [h * B, S, d], as [B, h, S, d]; a value of rank 4 stays. Null when the rank or the head
// count is not known.
Value* insert_rank_4(Graph& graph, SymbolicShapes& shapes, Value* value, HeadOrder order) {
  const auto shape = shapes.shape(value);
  if (!shape || (shape->size() != 3 && shape->size() != 4)) {
    return nullptr;
  }
  if (shape->size() == 4) {
    return value;
  }
  if (shape->front().is_constant()) {
    return nullptr;
  }
  const int64_t heads = shape->front().factor;
  if (order == HeadOrder::kRowsInHeads) {
    Value* sizes = graph.insertConstant(std::vector<int64_t>{heads, -1});
    return graph.insert(c10::aten::transpose, {graph.insert(c10::Symbol::aten("unflatten"), {value, 0, sizes}), 0, 1});
  }
  Value* sizes = graph.insertConstant(std::vector<int64_t>{-1, heads});
  return graph.insert(c10::Symbol::aten("unflatten"), {value, 0, sizes});
}

// Inserts [B, h, S, d] as the product with values was.
Value* insert_rank_3(Graph& graph, Value* output, HeadOrder order) {
  if (order == HeadOrder::kRowsInHeads) {
    output = graph.insert(c10::aten::transpose, {output, 0, 1});
  }
  return graph.insert(c10::aten::flatten, {output, 0, 1});
}

// `value` before all multiplications and divisions by numbers. The numbers go to `factors`.
Value* take_scale(Value* value, SymbolicShapes& shapes, Factors& factors) {
  for (Node* node = value->node(); is_aten(node, {"div", "mul"}) && !is_in_place(node) && node->inputs().size() == 2;
       node = value->node()) {
    Value* factor = node->namedInput("other");
    const auto shape = is_number(factor) ? Shape() : shapes.shape(factor).value_or(Shape{number(-1)});
    if (!shape.empty()) {
      break;
    }
    factors.dynamic.emplace_back(factor, is_aten(node, {"div"}));
    value = node->namedInput("self");
  }
  return value;
}

// The number of rows in scores [rows, S, S] whose size is `rows`: from what the queries are projected from, where that
// shows it, since a mask that reads no queries can be had before them.
Value* insert_rows(Graph& graph, SymbolicShapes& shapes, Value* anchor, Value* queries, const Dim& rows) {
  const auto shape = shapes.shape(anchor);
  const Dim batch = *rows.divided_by(number(rows.factor));
  const auto found = shape ? std::find(shape->begin(), shape->end(), batch) : Shape::iterator();
  if (!shape || found == shape->end()) {
    return graph.insert(c10::aten::size, {queries, 0});
  }
  Value* size = graph.insert(c10::aten::size, {anchor, found - shape->begin()});
  return graph.insert(c10::aten::mul, {size, rows.factor});
}

// Inserts the bias of scores [B * h, S, S] in a shape that broadcasts against [B, h, S, S]; null when the heads are not
// known. Nothing may show whether an input has one row for all or one for each head of each row: expanded, it has
// these.
Value* insert_mask_by_heads(Graph& graph, SymbolicShapes& shapes, Value* bias, Value* anchor, Node* product,
                            HeadOrder order) {
  const auto shape = shapes.shape(bias);
  if (shape && (shape->size() != 3 || shape->front().is_constant())) {
    return bias;
  }
  const auto scores = shapes.shape(product->output());
  if (!scores || scores->size() != 3 || scores->front().is_constant()) {
    return nullptr;
  }
  if (!shape || shape->front() != scores->front()) {
    Value* rows = insert_rows(graph, shapes, anchor, left_factor(product), scores->front());
    Value* same = graph.insertConstant(-1);
    Value* sizes = graph.insertNode(graph.createList(c10::IntType::get(), {rows, same, same}))->output();
    bias = graph.insert(c10::aten::expand, {graph.insert(c10::Symbol::aten("atleast_2d"), {bias}), sizes});
    shapes.assume(bias, {scores->front(), shapes.fresh(), shapes.fresh()});
  }
  return insert_rank_4(graph, shapes, bias, order);
}

// Inserts the bias in a shape that broadcasts against [B, h, S, S].
Value* insert_mask(Graph& graph, SymbolicShapes& shapes, Value* bias, Value* anchor, Node* product,
                   bool product_is_rank_3, HeadOrder order, bool& understood) {
  if (!bias) {
    return graph.insertConstant(c10::IValue());
  }
  if (product_is_rank_3) {
    bias = insert_mask_by_heads(graph, shapes, bias, anchor, product, order);
    understood = understood && bias;
    if (!bias) {
      return nullptr;
    }
  }
  bias = graph.insert(c10::Symbol::aten("atleast_2d"), {bias});  // what scaled_dot_product_attention asks for
  return graph.insert(c10::aten::type_as, {bias, anchor});
}

// Whether `value` was cast on its way from a linear map: GPT-J computes its scores in float32 whatever its dtype.
bool was_cast(Value* value) {
  for (Node* node = value->node(); is_layout(node) || is_aten(node, {"mul", "div"}); node = node->input(0)->node()) {
    if (is_aten(node, {"to", "type_as"})) {
      return true;
    }
  }
  return false;
}

// The attention around `softmax`; nullopt, with the reason in words, when it cannot be rewritten.
std::optional<Attention> find_one(Node* softmax, const torch::jit::Module& module, const Writes& writes,
                                  std::string& reason) {
  const auto consumer = find_consumer(softmax, reason);
  if (!consumer) {
    return std::nullopt;
  }
  Node* product = find_product(softmax->namedInput("self"));
  if (!product) {
    const Node* unclear = unclear_sum(softmax->namedInput("self"));
    reason = unclear ? described(unclear) + " adds two products, and which one is of queries and keys is not clear"
                     : "its input does not come from a product of queries and keys by scaling and masking alone";
    return std::nullopt;
  }
  if (product->owningBlock() != softmax->owningBlock() || consumer->product->owningBlock() != softmax->owningBlock()) {
    reason = "its products with keys and values are not in the same block";
    return std::nullopt;
  }
  // The new node reads these values later than the old ones did: at the second product.
  torch::jit::ValueSet moved = path_values(softmax->namedInput("self"), product);
  moved.insert({left_factor(product), right_factor(product), softmax->output(), left_factor(consumer->product)});
  const Node* writer = writes.between(product, consumer->product, moved);
  // take_scale() goes back to keys before their scale, on both sides of their transpose.
  Node* step = right_factor(product)->node();
  for (bool transposed = false; !writer; step = step->namedInput("self")->node()) {
    if (is_aten(step, {"div", "mul"})) {
      writer = writes.between(step, consumer->product, {step->inputs().begin(), step->inputs().end()});
    } else if (transposed || !is_aten(step, {"transpose"})) {
      break;
    } else {
      transposed = true;
    }
  }
  if (writer) {
    reason =
        described(writer) +
        " writes into its queries, keys, scores or mask in place, and another value may share that memory; write a "
        "new tensor instead";
    return std::nullopt;
  }
  if (const Node* once = what_must_run_once(softmax->namedInput("self"), product)) {
    reason = described(once) + " must run once, and stands in a branch that computes its mask, which is copied";
    return std::nullopt;
  }
  if (const auto why = why_no_mask(softmax->namedInput("self"), product, module)) {
    reason = *why;
    return std::nullopt;
  }
  return Attention{softmax, product, *consumer};
}

// The order of rows and heads in what has rank 3. Products pair queries, keys, values and scores element by element:
// the order of one is that of all.
HeadOrder order_of(const Attention& attention, SymbolicShapes& shapes) {
  bool is_flat = false;
  bool is_whole = true;
  HeadOrder result = HeadOrder::kUnknown;
  for (Value* value : {left_factor(attention.product), right_factor(attention.consumer.product)}) {
    const auto shape = shapes.shape(value);
    const bool has_rank_3 = shape && shape->size() == 3;
    is_flat = is_flat || has_rank_3;
    is_whole = is_whole && has_rank_3;
    result = has_rank_3 && result == HeadOrder::kUnknown ? head_order(shapes, value) : result;
  }
  // Beside heads in a dimension of their own, [B, h, S, d], none but [B * h] is known to fit.
  const bool is_clear = is_whole || result == HeadOrder::kHeadsInRows;
  return !is_flat ? HeadOrder::kHeadsInRows : is_clear ? result : HeadOrder::kUnknown;
}

// Why an attention whose heads have this order is not rewritten, in words.
std::optional<std::string> reason_against(HeadOrder order, bool has_masks_in_rank_4) {
  if (order == HeadOrder::kUnknown) {
    return "how the first dimension of its queries counts rows and heads is not known; view them as [batch, heads, "
           "tokens, head size]";
  }
  if (order == HeadOrder::kRowsInHeads && has_masks_in_rank_4) {
    return "its masks are added to scores of shape [heads, batch, queries, keys]; put the heads behind the batch";
  }
  return std::nullopt;
}

// Rewrites an attention. Returns the reason, in words, when it cannot.
std::optional<std::string> raise_one(const std::shared_ptr<Graph>& graph, SymbolicShapes& shapes,
                                     const Attention& attention) {
  const auto& [softmax, product, consumer] = attention;
  const auto dim = constant_int(softmax->namedInput("dim"));
  const auto rank = shapes.shape(left_factor(product));
  assume_heads(right_factor(product), rank, /*is_transposed=*/true, shapes);
  assume_heads(right_factor(consumer.product), rank, /*is_transposed=*/false, shapes);
  const auto value_rank = shapes.shape(right_factor(consumer.product));
  if (!rank || !value_rank) {
    return c10::str("the rank of its ", rank ? "values" : "queries", ", which ",
                    maker_of(rank ? right_factor(consumer.product) : left_factor(product)),
                    " makes, is not known; view them with numbers for heads and head size");
  }
  const auto scores = shapes.shape(softmax->namedInput("self"));
  const int64_t scores_rank = static_cast<int64_t>(scores ? scores->size() : rank->size());
  if (!dim || (*dim != -1 && *dim != scores_rank - 1 && (scores || *dim != 3))) {
    return "it is not over the last dimension";
  }
  torch::jit::WithInsertPoint guard(consumer.product);
  // The mask must not depend on the queries: gates that are pooled over real tokens need it before the queries exist.
  const auto linears = nearest_linears(left_factor(product));
  Value* anchor = linears.empty() ? left_factor(product) : linear_input(linears.front());
  AffinePath path(graph, shapes, product, anchor);
  Value* bias = path.bias(softmax->namedInput("self"));
  // A reshape on the way means that masks were applied in rank 4.
  const bool masked_in_rank_3 = rank->size() == 3 && value_rank->size() == 3 && *dim != 3 && !path.reshaped;
  const HeadOrder order = order_of(attention, shapes);
  if (const auto reason = reason_against(order, bias && path.reshaped)) {
    return reason;
  }
  Value* mask = insert_mask(*graph, shapes, bias, anchor, product, masked_in_rank_3, order, path.understood);
  Value* query = insert_rank_4(*graph, shapes, left_factor(product), order);
  // A scale of the keys scales all scores, also those of prefixes, which come beside the keys.
  Value* keys_transposed = take_scale(right_factor(product), shapes, path.factors);
  Value* keys = take_scale(insert_transposed(*graph, shapes, keys_transposed), shapes, path.factors);
  assume_heads(keys, rank, /*is_transposed=*/false, shapes);
  Value* key = insert_rank_4(*graph, shapes, keys, order);
  Value* value = insert_rank_4(*graph, shapes, right_factor(consumer.product), order);
  if (!path.understood || !query || !key || !value) {
    return path.understood ? "the heads are not a dimension of their own" : "its scale or mask is not understood";
  }
  // The fused op takes one dtype: cast queries and keys to that of the values, which prefixes have too.
  for (Value** heads : {&query, &key}) {
    *heads = was_cast(*heads) ? graph->insert(c10::aten::type_as, {*heads, value}) : *heads;
  }
  for (const auto& [factor, divides] : path.factors.dynamic) {
    Value* by = is_number(factor) ? factor : graph->insert(c10::aten::type_as, {factor, query});
    query = graph->insert(divides ? c10::aten::div : c10::aten::mul, {query, by});
  }
  Value* dropout_p = insert_dropout_p(*graph, consumer.dropout);
  Value* output = graph->insert(c10::aten::scaled_dot_product_attention, {query, key, value, mask, dropout_p, false},
                                {torch::jit::NamedValue("scale", path.factors.constant)});
  if (value_rank->size() == 3) {
    output = insert_rank_3(*graph, output, order);
  }
  consumer.product->output()->replaceAllUsesWith(output);
  return std::nullopt;
}

}  // namespace

std::vector<UnraisedSoftmax> raise_attention(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module) {
  std::vector<Node*> candidates;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_softmax(node)) {
      candidates.push_back(node);
    }
  });
  std::vector<UnraisedSoftmax> unraised;
  std::vector<Attention> attentions;
  const Writes writes(graph);
  for (Node* softmax : candidates) {
    std::string reason;
    if (const auto attention = find_one(softmax, module, writes, reason)) {
      attentions.push_back(*attention);
    } else {
      unraised.push_back({softmax, reason, may_be_attention(softmax)});
    }
  }
  SymbolicShapes shapes(module);
  for_each_node(graph->block(), [&](Node* node) {
    if (Node* activation = activation_of_scores(node, shapes)) {
      unraised.push_back({activation,
                          "its scores go through " + described(activation) +
                              " and no softmax, which is no attention that prefixes are defined for",
                          true});
    }
  });
  for (const Attention& attention : attentions) {
    if (const auto reason = raise_one(graph, shapes, attention)) {
      unraised.push_back({attention.softmax, *reason, may_be_attention(attention.softmax)});
    }
  }
  return unraised;
}

}  // namespace torchgraft
