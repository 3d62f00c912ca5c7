#include <torchgraft/patch/canonicalise/decompose_fused_encoder.h>

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>
#include <torchgraft/patch/graph/source_parts.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// The fused kernels turn any mask into booleans first: non-zero (also -inf) means "may not attend".
// mask_type: 0 = [S, S], 1 = [B, S] (padding), 2 = [B, h, S, S].
constexpr const char* kEncoderLayer = R"python(
def blocking_mask(mask: Optional[Tensor], mask_type: Optional[int], batch: int, length: int,
                  dtype: int) -> Optional[Tensor]:
    if mask is None:
        return None
    blocked = mask.ne(0)
    kind = 2 if mask_type is None else mask_type
    if kind == 0:
        blocked = blocked.view(1, 1, length, length)
    elif kind == 1:
        blocked = blocked.view(batch, 1, 1, length)
    return additive_mask(blocked, dtype)

def attention(x: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
              proj_bias: Tensor, mask: Optional[Tensor], mask_type: Optional[int]) -> Tensor:
    batch, length = x.size(0), x.size(1)
    q, k, v = torch.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
    head_dim = embed_dim // num_heads
    q = q.view(batch, length, num_heads, head_dim).transpose(1, 2)
    k = k.view(batch, length, num_heads, head_dim).transpose(1, 2)
    v = v.view(batch, length, num_heads, head_dim).transpose(1, 2)
    context = torch.scaled_dot_product_attention(q, k, v, blocking_mask(mask, mask_type, batch, length, x.dtype))
    return torch.linear(context.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)

def feed_forward(x: Tensor, use_gelu: bool, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor,
                 bias_2: Tensor) -> Tensor:
    hidden = torch.linear(x, weight_1, bias_1)
    if use_gelu:
        hidden = torch.gelu(hidden)
    else:
        hidden = torch.relu(hidden)
    return torch.linear(hidden, weight_2, bias_2)

def encoder_layer(
        src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
        proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
        norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
        ffn_bias_2: Tensor, mask: Optional[Tensor], mask_type: Optional[int]) -> Tensor:
    shape = [embed_dim]
    x = src
    if norm_first:
        h = torch.layer_norm(x, shape, norm_weight_1, norm_bias_1, eps)
        x = x + attention(h, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
        h = torch.layer_norm(x, shape, norm_weight_2, norm_bias_2, eps)
        return x + feed_forward(h, use_gelu, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2)
    h = attention(x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    x = torch.layer_norm(x + h, shape, norm_weight_1, norm_bias_1, eps)
    h = feed_forward(x, use_gelu, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2)
    return torch.layer_norm(x + h, shape, norm_weight_2, norm_bias_2, eps)

def native_attention(
        query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor,
        qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Optional[Tensor], need_weights: bool,
        average_attn_weights: bool, mask_type: Optional[int]) -> Tensor:
    return attention(query, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)

def padded(dense: Tensor, keep: Tensor, padding: float) -> Tensor:
    return dense.masked_fill(keep.eq(0).unsqueeze(-1), padding)
)python";

std::shared_ptr<Graph> compile_part(const std::string& name) {
  return compile_graph(additive_mask_source() + kEncoderLayer, name);
}

constexpr size_t kEncoderMask = 18;
constexpr size_t kEncoderMaskType = 19;

bool is_fused(const Node* node) {
  return is_aten(node, {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"});
}

bool has_fused(const Block* block) { return std::any_of(block->nodes().begin(), block->nodes().end(), is_fused); }

// Makes every prim::If with a fused op directly in one of its blocks take the other block. Replaces the condition
// wherever it is used: the early return of the fused side depends on it too.
void pin_unfused_branch(Graph& graph) {
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() != c10::prim::If) {
      return;
    }
    for (size_t i = 0; i < 2; ++i) {
      if (has_fused(node->blocks()[i])) {
        torch::jit::WithInsertPoint guard(node);
        node->input()->replaceAllUsesWith(graph.insertConstant(/*take the true block:*/ i == 1));
        return;
      }
    }
  });
}

// A nested tensor's mask: `keep` is true for real tokens; in a scripted module it is the negation of `padding`, which
// outlives the branch that `keep` is computed in.
struct NestedMask {
  Value* keep = nullptr;
  Value* padding = nullptr;
};

Value* insert_padded(Node* to_padded, const NestedMask& mask) {
  Graph* graph = to_padded->owningGraph();
  torch::jit::WithInsertPoint guard(to_padded);
  Value* keep = mask.keep;
  if (mask.padding) {
    Value* padding = mask.padding;
    if (padding->type()->kind() == c10::TypeKind::OptionalType) {
      padding = graph->insert(c10::aten::_unwrap_optional, {padding});
    }
    keep = graph->insert(c10::aten::logical_not, {padding});
  }
  const auto body = compile_part("padded");
  return insert_graph_before(to_padded, *body,
                             {to_padded->namedInput("self"), keep, to_padded->namedInput("padding")})[0];
}

// A scripted module has `if use_nested: output, mask = nested(output, mask), None`. Keeps the branch, but makes it
// dense and lets it yield its mask: the value that the other side yields instead of None. Returns false when there is
// no such value, or more than one.
bool densify_branch(Node* nested, NestedMask& mask) {
  Block* block = nested->owningBlock();
  Node* branch = block->owningNode();
  if (branch->kind() != c10::prim::If) {
    return false;
  }
  Block* other = branch->blocks()[branch->blocks()[0] == block ? 1 : 0];
  std::vector<size_t> dropped;
  for (size_t i = 0; i < block->outputs().size(); ++i) {
    if (is_none(block->outputs()[i]) && !is_none(other->outputs()[i])) {
      dropped.push_back(i);
    }
  }
  if (dropped.size() != 1 || other->outputs()[dropped[0]]->node()->owningBlock() == other) {
    return false;
  }
  mask.padding = other->outputs()[dropped[0]];
  block->replaceOutput(dropped[0], mask.padding);
  replace_node(nested, {nested->namedInput("t")});
  return true;
}

void densify_nested(const std::shared_ptr<Graph>& graph) {
  std::vector<Node*> sources;
  std::vector<Node*> sinks;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"_nested_tensor_from_mask"})) {
      sources.push_back(node);
    } else if (is_aten(node, {"to_padded_tensor"})) {
      sinks.push_back(node);
    }
  });
  // Several encoders in one module: sources and sinks pair up in execution order.
  if (sources.size() != sinks.size()) {
    return;
  }
  for (size_t i = 0; i < sources.size(); ++i) {
    NestedMask mask{sources[i]->namedInput("mask"), nullptr};
    if (sources[i]->owningBlock() != graph->block()) {
      if (!densify_branch(sources[i], mask)) {
        continue;
      }
    } else {
      // In a straight line the fused layers between source and sink run without a mask: give them this one.
      torch::jit::WithInsertPoint guard(sources[i]);
      Value* padding = graph->insert(c10::aten::logical_not, {mask.keep});
      Value* padding_type = graph->insertConstant(1);
      Value* current = sources[i]->output();
      for (Node* node = sources[i]->next(); node != sinks[i]; node = node->next()) {
        if (is_aten(node, {"_transformer_encoder_layer_fwd"}) && node->namedInput("src") == current) {
          node->replaceInput(kEncoderMask, padding);
          node->replaceInput(kEncoderMaskType, padding_type);
          current = node->output();
        }
      }
      replace_node(sources[i], {sources[i]->namedInput("t")});
    }
    replace_node(sinks[i], {insert_padded(sinks[i], mask)});
  }
}

// Decomposes the fused ops in straight lines. The code that asks whether tensors are nested sees dense ones now, and
// does no harm.
void decompose_straight_line(Graph& graph) {
  for_each_node(graph.block(), [&](Node* node) {
    if (is_aten(node, {"_transformer_encoder_layer_fwd"})) {
      const auto body = compile_part("encoder_layer");
      replace_node(node, insert_graph_before(node, *body, node->inputs()));
      return;
    }
    const bool plain_attention =
        is_aten(node, {"_native_multi_head_attention"}) && node->namedInput("query") == node->namedInput("key") &&
        node->namedInput("key") == node->namedInput("value") && node->outputs()[1]->uses().empty();
    if (plain_attention) {
      const auto body = compile_part("native_attention");
      node->outputs()[0]->replaceAllUsesWith(insert_graph_before(node, *body, node->inputs())[0]);
      node->destroy();
    }
  });
}

}  // namespace

bool may_run_fused_encoder(const Graph& graph) {
  const auto inlined = const_cast<Graph&>(graph).copy();
  inline_all(*inlined);
  bool may = false;
  for_each_node(inlined->block(), [&](const Node* node) {
    may = may || (node->kind() == c10::prim::If && (has_fused(node->blocks()[0]) || has_fused(node->blocks()[1])));
  });
  return may;
}

void decompose_fused_encoder(const std::shared_ptr<Graph>& graph) {
  densify_nested(graph);
  pin_unfused_branch(*graph);
  simplify(graph);
  decompose_straight_line(*graph);
  simplify(graph);
}

}  // namespace torchgraft
