#include <torchgraft/patch/canonicalise/decompose_multihead_attention.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/source_parts.h>

#include <torch/csrc/jit/ir/constants.h>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// dtype 11 is torch.bool. Masks: true (or -inf) where attention is forbidden, as torch.nn.MultiheadAttention has them.
constexpr const char* kMultiheadAttention = R"python(
def additive(mask: Tensor, dtype: int) -> Tensor:
    return additive_mask(mask, dtype) if mask.dtype == 11 else mask

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

def project_together(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Optional[Tensor]):
    q, k, v = torch.linear(query, weight, bias).chunk(3, dim=-1)
    return q, k, v

def project_with(query: Tensor, key: Tensor, value: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor,
                 bias: Optional[Tensor]):
    if bias is None:
        return torch.linear(query, q_weight), torch.linear(key, k_weight), torch.linear(value, v_weight)
    q_bias, k_bias, v_bias = bias.chunk(3)
    return torch.linear(query, q_weight, q_bias), torch.linear(key, k_weight, k_bias), \
        torch.linear(value, v_weight, v_bias)

def project_apart(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Optional[Tensor]):
    q_weight, k_weight, v_weight = weight.chunk(3)
    return project_with(query, key, value, q_weight, k_weight, v_weight, bias)

def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor],
           out_weight: Tensor, out_bias: Optional[Tensor], heads: int, head_dim: int, batch_first: bool,
           dropout: float, training: bool) -> Tensor:
    assert q.dim() == 3, "torchgraft: a grafted MultiheadAttention needs batched input, of rank 3"
    if batch_first:
        batch, queries, keys = q.size(0), q.size(1), k.size(1)
        q = q.view(batch, queries, heads, head_dim).transpose(1, 2)
        k = k.view(batch, keys, heads, head_dim).transpose(1, 2)
        v = v.view(batch, keys, heads, head_dim).transpose(1, 2)
    else:
        batch, queries, keys = q.size(1), q.size(0), k.size(0)
        q = q.view(queries, batch, heads, head_dim).permute(1, 2, 0, 3)
        k = k.view(keys, batch, heads, head_dim).permute(1, 2, 0, 3)
        v = v.view(keys, batch, heads, head_dim).permute(1, 2, 0, 3)
    mask = merged_mask(attn_mask, key_padding_mask, batch, heads, queries, keys, q.dtype)
    p = dropout if training else 0.0
    context = torch.scaled_dot_product_attention(q, k, v, mask, p)
    if batch_first:
        context = context.transpose(1, 2).reshape(batch, queries, heads * head_dim)
    else:
        context = context.permute(2, 0, 1, 3).reshape(queries, batch, heads * head_dim)
    return torch.linear(context, out_weight, out_bias)
)python";

std::shared_ptr<Graph> compile_function(const std::string& name) {
  return compile_graph(additive_mask_source() + kMultiheadAttention, name);
}

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

// True when the attention weights, second in the result, are None or never read.
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

// Whether the projections are parameters, and torch.nn adds nothing to the keys and values.
bool has_plain_projections(const c10::IValue& module) {
  const bool packed = is_true(module, "_qkv_same_embed_dim");
  const auto is_tensor = [&](const char* name) { return attribute_or_constant(module, name).isTensor(); };
  const bool has_weights = packed
                               ? is_tensor("in_proj_weight")
                               : is_tensor("q_proj_weight") && is_tensor("k_proj_weight") && is_tensor("v_proj_weight");
  return has_weights && attribute_or_constant(module, "bias_k").isNone() &&
         attribute_or_constant(module, "bias_v").isNone() && !is_true(module, "add_zero_attn") &&
         attribute_or_constant(module, "num_heads").isInt();
}

// Inserts projections and scaled_dot_product_attention for one call, before it.
class StraightLine {
 public:
  StraightLine(Node* call, c10::IValue module) : call_(call), graph_(call->owningGraph()), module_(std::move(module)) {}

  Value* insert() {
    std::vector<Value*> inputs = insert_projections();
    Value* out_proj = get(self(), "out_proj");
    const std::vector<Value*> others = {call_->input(kAttnMask),
                                        call_->input(kKeyPaddingMask),
                                        get(out_proj, "weight"),
                                        get(out_proj, "bias"),
                                        get(self(), "num_heads"),
                                        get(self(), "head_dim"),
                                        graph_->insertConstant(is_true(module_, "batch_first")),
                                        get(self(), "dropout"),
                                        get(self(), "training")};
    inputs.insert(inputs.end(), others.begin(), others.end());
    return insert_graph_before(call_, *compile_function("attend"), inputs)[0];
  }

 private:
  Value* self() { return call_->input(kSelf); }

  Value* get(Value* object, const std::string& name) {
    const bool is_attribute = object->type()->expectRef<c10::ClassType>().hasAttribute(name);
    return is_attribute ? graph_->insertGetAttr(object, name)
                        : graph_->insertConstant(attribute_or_constant(module_, name));
  }

  // q, k and v: one product when they have one input, else three, with rows of in_proj_weight or with three weights.
  std::vector<Value*> insert_projections() {
    std::vector<Value*> inputs = {call_->input(kQuery), call_->input(kKey), call_->input(kValue)};
    const bool packed = is_true(module_, "_qkv_same_embed_dim");
    const bool one_input = inputs[0] == inputs[1] && inputs[1] == inputs[2];
    if (packed) {
      inputs.push_back(get(self(), "in_proj_weight"));
    } else {
      for (const char* name : {"q_proj_weight", "k_proj_weight", "v_proj_weight"}) {
        inputs.push_back(get(self(), name));
      }
    }
    inputs.push_back(get(self(), "in_proj_bias"));
    const char* body = !packed ? "project_with" : one_input ? "project_together" : "project_apart";
    Value* heads = insert_graph_before(call_, *compile_function(body), inputs)[0];
    Node* unpack = graph_->insertNode(graph_->createTupleUnpack(heads));
    return {unpack->outputs().begin(), unpack->outputs().end()};
  }

  Node* call_;
  Graph* graph_;
  c10::IValue module_;
};

}  // namespace

bool decompose_multihead_attention(Node* call, const Module& root) {
  if (!is_scripted_multihead_attention(call) || !weights_are_unread(call)) {
    return false;
  }
  const auto attention = resolve_attribute(call->input(kSelf), root);
  if (!attention || !has_plain_projections(attention->value)) {
    return false;
  }
  Graph* graph = call->owningGraph();
  torch::jit::WithInsertPoint guard(call);
  Value* output = StraightLine(call, attention->value).insert();
  Value* none = graph->insertConstant(c10::IValue());
  Value* pair = graph->insertNode(graph->createTuple({output, none}))->output();
  pair->setType(call->output()->type());
  replace_node(call, {pair});
  return true;
}

}  // namespace torchgraft
