#include <torchgraft/patch/insert/decompose_adapters.h>

#include <torchgraft/patch/graph/activation_source.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/source_parts.h>
#include <torchgraft/patch/insert/row_functions.h>
#include <torchgraft/registration/masked_score.h>

#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// 11 is torch.bool: TorchScript that is compiled in C++ has no name for it.
constexpr const char* kHelpers = R"python(
def update(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, gate: Tensor, adapter_ids: Optional[Tensor],
           adapter: int) -> Tensor:
    coefficient = present(scaling, adapter_ids, adapter).view(-1, 1, 1) * gate.unsqueeze(-1)
    hidden = torch.matmul(x, present(lora_a, adapter_ids, adapter).transpose(1, 2))
    return torch.matmul(hidden * coefficient, present(lora_b, adapter_ids, adapter).transpose(1, 2))

def prefixed_mask(query: Tensor, key: Tensor, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
    if attn_mask is not None:
        mask = attn_mask
        if mask.dtype == 11:
            mask = additive_mask(torch.logical_not(mask), query.dtype)
        mask = mask.to(query.dtype)
        sizes = list(mask.size())
        return mask.view([1] * (4 - len(sizes)) + sizes)
    seen = torch.ones([1, 1, query.size(2), key.size(2)], dtype=11, device=query.device)
    if is_causal:
        seen = seen.tril()
    return additive_mask(torch.logical_not(seen), query.dtype)
)python";

// The end of both bottlenecks' bodies: computes the result from x, residual and gate.
constexpr const char* kBottleneck = R"python(
    inner = torch.matmul(x, present(down_weight, adapter_ids, adapter).transpose(1, 2)) + \
        present(down_bias, adapter_ids, adapter).unsqueeze(1)
    hidden = ACTIVATION
    up = torch.matmul(hidden, present(up_weight, adapter_ids, adapter).transpose(1, 2)) + \
        present(up_bias, adapter_ids, adapter).unsqueeze(1)
    return residual + up * (present(scaling, adapter_ids, adapter).unsqueeze(1) * gate.unsqueeze(-1)), gate
)python";

// A unit of ReFT: the first for the first tokens of a row, the last for its last ones, which overrule them.
constexpr const char* kReftUnit = R"python(
    source = selected(source_weight, adapter_ids, adapter).select(1, -WHICH).transpose(1, 2)
    inner = torch.matmul(x, source) + selected(source_bias, adapter_ids, adapter).select(1, -WHICH).unsqueeze(1)
    rows = selected(projection, adapter_ids, adapter).select(1, -WHICH)
    hidden = (ACTIVATION) - torch.matmul(x, rows.transpose(1, 2)) * subtracted
    result = torch.where(flags.select(1, WHICH).unsqueeze(-1), x + torch.matmul(hidden, rows), result)
)python";

// The body of a function that computes what an op does; its arguments are those of the op's schema. OP stands for the
// op's name, BOTTLENECK and UNIT for the texts above.
using Bodies = std::map<std::string, const char*>;

const Bodies& bodies() {
  static const Bodies kBodies = {
      {"gated_lora", R"python(
    check_ids(OP, x, adapter_ids, scaling)
    gate = pooled(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    return base + update(x, lora_a, lora_b, scaling, gate, adapter_ids, adapter), gate
)python"},
      {"gated_lora_linear", R"python(
    check_ids(OP, x, adapter_ids, scaling)
    gate = pooled(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    base = torch.linear(x, weight, bias)
    return base + update(x, lora_a, lora_b, scaling, gate, adapter_ids, adapter), gate
)python"},
      {"gated_bottleneck", R"python(
    check_ids(OP, x, adapter_ids, scaling)
    gate = pooled(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
BOTTLENECK
)python"},
      {"gated_bottleneck_linear", R"python(
    check_ids(OP, x, adapter_ids, scaling)
    gate = pooled(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    residual = torch.linear(input, weight, bias)
BOTTLENECK
)python"},
      {"gated_prefix_attention", R"python(
    check_ids(OP, x, adapter_ids, prefix_key)
    gate = pooled(x, gate_weight, gate_bias, adapter_ids, adapter, token_mask)
    rows, columns = query.size(0), gate.size(1)
    length = prefix_key.size(2)
    positions = torch.arange(length, device=query.device).unsqueeze(0)
    used = torch.logical_and(positions.lt(selected(prefix_length, adapter_ids, adapter).unsqueeze(1)),
                             is_active(x, adapter_ids, adapter).unsqueeze(1))
    absent = torch.logical_not(used).view(-1, 1, length, 1)
    prefixed_key = selected(prefix_key, adapter_ids, adapter).masked_fill(absent, 0) * \
        gate.narrow(1, 0, 1).view(rows, 1, 1, 1)
    prefixed_value = selected(prefix_value, adapter_ids, adapter).masked_fill(absent, 0) * \
        gate.narrow(1, columns - 1, 1).view(rows, 1, 1, 1)
    hidden = absent.view(-1, 1, 1, length)
    mask = prefixed_mask(query, key, attn_mask, is_causal)
    prefix_mask = additive_mask(hidden, query.dtype).expand(rows, mask.size(1), query.size(2), length)
    mask = torch.cat([prefix_mask, mask.expand(rows, mask.size(1), query.size(2), key.size(2))], -1)
    keys = torch.cat([prefixed_key, key], 2)
    values = torch.cat([prefixed_value, value], 2)
    if enable_gqa:
        keys = keys.repeat_interleave(query.size(1) // key.size(1), 1)
        values = values.repeat_interleave(query.size(1) // value.size(1), 1)
    output = torch.scaled_dot_product_attention(query, keys, values, mask, dropout_p, False, scale=scale)
    return output.transpose(1, 2).contiguous().transpose(1, 2), gate
)python"},
      {"reft", R"python(
    check_ids(OP, x, adapter_ids, positions)
    flags = position_flags(x, positions, adapter_ids, adapter, token_mask)
    subtracted = selected(subtraction, adapter_ids, adapter).view(-1, 1, 1)
    result = x
UNIT_OF_PREFIX
UNIT_OF_SUFFIX
    return result
)python"},
      {"attention_token_mask", R"python(
    if attn_mask is None:
        return torch.ones([x.size(0), x.size(1)], dtype=11, device=x.device)
    else:
        visible = attn_mask
        if visible.dtype != 11:
            visible = visible.gt(MASKED_SCORE)
        if attn_mask.dim() == 4:
            visible = visible.any(1)
        elif attn_mask.dim() == 3:
            visible = visible.any(0)
        return seen_by_real_queries(visible).expand(x.size(0), x.size(1)).contiguous()
)python"},
  };
  return kBodies;
}

// Replaces the first `word` of `text`; returns whether there was one.
bool replace_word(std::string& text, const std::string& word, const std::string& by) {
  const size_t at = text.find(word);
  if (at == std::string::npos) {
    return false;
  }
  text.replace(at, word.size(), by);
  return true;
}

std::string reft_unit_source(const std::string& which) {
  std::string source = kReftUnit;
  while (replace_word(source, "WHICH", which)) {
  }
  return source;
}

// The source of a function for the inputs of `node`. An input that is None becomes a local constant None, so that no
// branch on it is left.
std::string source_for(const Node* node, std::string body, const std::string& name) {
  std::string parameters;
  std::string nones;
  for (size_t i = 0; i < node->inputs().size(); ++i) {
    const std::string argument = node->schema().arguments().at(i).name();
    if (is_none(node->input(i))) {
      nones += "    " + argument + " = None\n";
    } else {
      parameters += (parameters.empty() ? "" : ", ") + argument + ": " + node->input(i)->type()->annotation_str();
    }
  }
  replace_word(body, "BOTTLENECK", kBottleneck);
  replace_word(body, "UNIT_OF_PREFIX", reft_unit_source("0"));
  replace_word(body, "UNIT_OF_SUFFIX", reft_unit_source("1"));
  if (body.find("ACTIVATION") != std::string::npos) {
    const auto non_linearity = torch::jit::toIValue(node->namedInput("non_linearity"));
    TORCH_INTERNAL_ASSERT(non_linearity, "the non-linearity of ", name, " is no constant");
    while (replace_word(body, "ACTIVATION", activation_source(non_linearity->toStringRef()))) {
    }
  }
  replace_word(body, "OP", "\"" + name + "\"");
  replace_word(body, "MASKED_SCORE", number_source(kMaskedScore));
  return additive_mask_source() + row_source() + kHelpers + ("\ndef " + name + "(" + parameters + "):\n") + nones +
         body.substr(1);
}

}  // namespace

void decompose_adapters(const std::shared_ptr<Graph>& graph) {
  static const auto kNamespace = c10::Symbol::fromQualString("namespaces::torchgraft");
  std::vector<Node*> ops;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind().ns() == kNamespace && bodies().count(node->kind().toUnqualString())) {
      ops.push_back(node);
    }
  });
  std::map<std::string, std::shared_ptr<Graph>> functions;  // by source
  for (Node* node : ops) {
    const std::string name = node->kind().toUnqualString();
    const std::string source = source_for(node, bodies().at(name), name);
    std::shared_ptr<Graph>& body = functions[source];
    if (!body) {
      body = compile_graph(source, name);
      torch::jit::ConstantPropagation(body);
    }
    std::vector<Value*> inputs;
    std::copy_if(node->inputs().begin(), node->inputs().end(), std::back_inserter(inputs),
                 [](Value* input) { return !is_none(input); });
    std::vector<Value*> outputs = insert_graph_before(node, *body, inputs);
    if (node->outputs().size() == 2) {  // the body returns both as one tuple
      torch::jit::WithInsertPoint guard(node);
      Node* unpack = graph->insertNode(graph->createTupleUnpack(outputs.at(0)));
      outputs.assign(unpack->outputs().begin(), unpack->outputs().end());
    }
    replace_node(node, outputs);
  }
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
