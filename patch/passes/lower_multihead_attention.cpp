#include <torchgraft/patch/passes/lower_multihead_attention.h>

#include <torchgraft/patch/graph_utils.h>

#include <torch/csrc/jit/ir/constants.h>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// dtype 11 is torch.bool. Masks: true (or -inf) where attention is forbidden, as torch.nn.MultiheadAttention has them.
constexpr const char* kSource = R"python(
def additive(mask: Tensor, dtype: int) -> Tensor:
    if mask.dtype == 11:
        return torch.masked_fill(torch.zeros_like(mask, dtype=dtype), mask, float("-inf"))
    return mask

def merged_mask(attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor],
                batch: int, heads: int, queries: int, keys: int, dtype: int) -> Optional[Tensor]:
    mask: Optional[Tensor] = None
    if attn_mask is not None:
        pairs = additive(attn_mask, dtype)
        if pairs.dim() == 2:
            pairs = pairs.view(1, 1, queries, keys)
        else:
            pairs = pairs.view(batch, heads, queries, keys)
        mask = pairs
    if key_padding_mask is not None:
        padding = additive(key_padding_mask, dtype).view(batch, 1, 1, keys)
        if mask is None:
            mask = padding
        else:
            mask = mask + padding
    return mask

def self_attention_batch_first(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor],
        in_proj_weight: Tensor, in_proj_bias: Optional[Tensor], out_weight: Tensor, out_bias: Optional[Tensor],
        heads: int, head_dim: int, dropout: float, training: bool) -> Tensor:
    assert query.dim() == 3, "torchgraft: a grafted MultiheadAttention needs batched input, of shape [B, S, H]"
    batch, length = query.size(0), query.size(1)
    q, k, v = torch.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    q = q.view(batch, length, heads, head_dim).transpose(1, 2)
    k = k.view(batch, length, heads, head_dim).transpose(1, 2)
    v = v.view(batch, length, heads, head_dim).transpose(1, 2)
    mask = merged_mask(attn_mask, key_padding_mask, batch, heads, length, length, query.dtype)
    p = dropout if training else 0.0
    context = torch.scaled_dot_product_attention(q, k, v, mask, p)
    context = context.transpose(1, 2).reshape(batch, length, heads * head_dim)
    return torch.linear(context, out_weight, out_bias)

def self_attention_sequence_first(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor],
        in_proj_weight: Tensor, in_proj_bias: Optional[Tensor], out_weight: Tensor, out_bias: Optional[Tensor],
        heads: int, head_dim: int, dropout: float, training: bool) -> Tensor:
    assert query.dim() == 3, "torchgraft: a grafted MultiheadAttention needs batched input, of shape [S, B, H]"
    length, batch = query.size(0), query.size(1)
    q, k, v = torch.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    q = q.view(length, batch, heads, head_dim).permute(1, 2, 0, 3)
    k = k.view(length, batch, heads, head_dim).permute(1, 2, 0, 3)
    v = v.view(length, batch, heads, head_dim).permute(1, 2, 0, 3)
    mask = merged_mask(attn_mask, key_padding_mask, batch, heads, length, length, query.dtype)
    p = dropout if training else 0.0
    context = torch.scaled_dot_product_attention(q, k, v, mask, p)
    context = context.permute(2, 0, 1, 3).reshape(length, batch, heads * head_dim)
    return torch.linear(context, out_weight, out_bias)
)python";

// Inputs of a scripted torch.nn.MultiheadAttention.forward.
enum Input { kSelf, kQuery, kKey, kValue, kKeyPaddingMask, kNeedWeights, kAttnMask, kAverage, kIsCausal, kInputs };

bool is_scripted_multihead_attention(const Node* call) {
  if (call->s(c10::attr::name) != "forward" || call->inputs().size() != kInputs ||
      demangled_name(call->input(kSelf)->type()) != "torch.nn.modules.activation.MultiheadAttention") {
    return false;
  }
  const auto& function = call->input(kSelf)->type()->expectRef<c10::ClassType>().getMethod("forward");
  return function.getSchema().arguments()[kNeedWeights].name() == "need_weights";
}

// True when the attention weights, second in the result, are None or read by nobody.
bool weights_are_unread(const Node* call) {
  const auto need_weights = torch::jit::toIValue(call->input(kNeedWeights));
  if (need_weights && need_weights->isBool() && !need_weights->toBool()) {
    return true;
  }
  for (const auto& use : call->output()->uses()) {
    const bool first_of_tuple = use.user->kind() == c10::prim::TupleIndex && constant_int(use.user->input(1)) == 0;
    const bool unpacked = use.user->kind() == c10::prim::TupleUnpack && use.user->outputs()[1]->uses().empty();
    if (!first_of_tuple && !unpacked) {
      return false;
    }
  }
  return true;
}

// An attribute of a scripted module; some versions of the class script theirs as constants of the type.
c10::IValue attribute_or_constant(const c10::IValue& module, const std::string& name) {
  const auto& object = module.toObjectRef();
  if (object.type()->findAttributeSlot(name)) {
    return object.getAttr(name);
  }
  const auto slot = object.type()->findConstantSlot(name);
  return slot ? object.type()->getConstant(*slot) : c10::IValue();
}

bool is_true(const c10::IValue& module, const std::string& name) {
  const c10::IValue value = attribute_or_constant(module, name);
  return value.isBool() && value.toBool();
}

bool has_plain_projections(const c10::IValue& module) {
  return is_true(module, "_qkv_same_embed_dim") && attribute_or_constant(module, "bias_k").isNone() &&
         attribute_or_constant(module, "bias_v").isNone() && !is_true(module, "add_zero_attn") &&
         attribute_or_constant(module, "in_proj_weight").isTensor() &&
         attribute_or_constant(module, "num_heads").isInt();
}

}  // namespace

bool lower_multihead_attention(Node* call, const Module& root) {
  if (!is_scripted_multihead_attention(call) || !weights_are_unread(call)) {
    return false;
  }
  // Self attention only: with other keys each projection has an input of its own.
  if (call->input(kQuery) != call->input(kKey) || call->input(kKey) != call->input(kValue)) {
    return false;
  }
  const auto attention = resolve_attribute(call->input(kSelf), root);
  if (!attention || !has_plain_projections(attention->value)) {
    return false;
  }
  const bool batch_first = is_true(attention->value, "batch_first");
  const auto body =
      compile_graph(kSource, batch_first ? "self_attention_batch_first" : "self_attention_sequence_first");

  Graph* graph = call->owningGraph();
  torch::jit::WithInsertPoint guard(call);
  const auto get = [&](Value* object, const std::string& name) {
    const bool is_attribute = object->type()->expectRef<c10::ClassType>().hasAttribute(name);
    return is_attribute ? graph->insertGetAttr(object, name)
                        : graph->insertConstant(attribute_or_constant(attention->value, name));
  };
  Value* self = call->input(kSelf);
  Value* out_proj = get(self, "out_proj");
  const std::vector<Value*> inputs = {
      call->input(kQuery),          call->input(kKey),           call->input(kValue),       call->input(kAttnMask),
      call->input(kKeyPaddingMask), get(self, "in_proj_weight"), get(self, "in_proj_bias"), get(out_proj, "weight"),
      get(out_proj, "bias"),        get(self, "num_heads"),      get(self, "head_dim"),     get(self, "dropout"),
      get(self, "training")};
  Value* output = insert_graph_before(call, *body, inputs)[0];
  Value* none = graph->insertConstant(c10::IValue());
  Value* pair = graph->insertNode(graph->createTuple({output, none}))->output();
  pair->setType(call->output()->type());
  replace_node(call, {pair});
  return true;
}

}  // namespace torchgraft
