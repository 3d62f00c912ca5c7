#include <torchgraft/patch/sites/find_residual.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

std::vector<Value*> streams_of(Value* input) {
  std::vector<Value*> result = {strip_passive(input)};
  if (is_norm(result.front()->node())) {
    result.push_back(strip_passive(result.front()->node()->namedInput("input")));
  }
  return result;
}

NormOrder norm_order(Value* input, Value* residual) {
  const auto streams = streams_of(input);
  residual = strip_passive(residual);
  if (residual == streams.front()) {
    return NormOrder::kPost;
  }
  return residual == streams.back() ? NormOrder::kPre : NormOrder::kNone;
}

Node* norm_after(Value* sum) {
  while (true) {
    const auto uses = data_uses(sum);
    if (uses.size() != 1 || uses[0].offset != 0) {
      return nullptr;
    }
    Node* user = uses[0].user;
    if (is_norm(user)) {
      return user;
    }
    if (!is_aten(user, {"to", "type_as", "contiguous", "clone", "alias", "detach", "dropout"})) {
      return nullptr;
    }
    sum = user->output();
  }
}

namespace {

// `node`, or the node of `block` that it stands in; null where it stands elsewhere.
Node* in_block(Node* node, const torch::jit::Block* block) {
  while (node && node->owningBlock() != block) {
    node = node->owningBlock()->owningNode();
  }
  return node;
}

// The one node of the block of `value` that reads it, and at which input. A branch (stochastic depth in training) may
// read it many times.
std::optional<torch::jit::Use> only_reader(Value* value) {
  const auto uses = data_uses(value);
  if (uses.empty()) {
    return std::nullopt;
  }
  const torch::jit::Block* block = value->node()->owningBlock();
  Node* reader = in_block(uses[0].user, block);
  for (const auto& use : uses) {
    if (in_block(use.user, block) != reader) {
      return std::nullopt;
    }
  }
  const bool direct = uses[0].user == reader;
  if (!reader || (direct && uses.size() > 1)) {
    return std::nullopt;
  }
  return torch::jit::Use(reader, direct ? uses[0].offset : 0);
}

bool is_tensor_add(const Node* node) {
  return is_aten(node, {"add"}) && has_unit_alpha(node) && is_tensor(node->input(0)) && is_tensor(node->input(1));
}

// The one of `streams` that is `operand`, or a term of it when `operand` is a sum, as x is of x + attention(x). Null
// when there is none.
Value* stream_in(Value* operand, const std::vector<Value*>& streams) {
  if (std::find(streams.begin(), streams.end(), strip_passive(operand)) != streams.end()) {
    return operand;
  }
  Node* add = operand->node();
  if (!is_tensor_add(add)) {
    return nullptr;
  }
  Value* found = stream_in(add->namedInput("self"), streams);
  return found ? found : stream_in(add->namedInput("other"), streams);
}

// The one reader of `value` behind casts and dropout.
std::optional<torch::jit::Use> only_reader_behind_passive(Value* value) {
  auto reader = only_reader(value);
  while (reader && (is_layout(reader->user) || is_aten(reader->user, {"dropout"})) && reader->offset == 0) {
    reader = only_reader(reader->user->output());
  }
  return reader;
}

// Whether `value` is one vector of features, as a bias is.
bool is_vector(SiteFinder& finder, Value* value) {
  const at::Tensor tensor = resolve_tensor(strip_layout(value), finder.module());
  return tensor.defined() && tensor.dim() > 0 && tensor.numel() == tensor.size(-1);
}

// Whether a bias stands behind the residual add, (x + product) + bias.
bool adds_bias_behind(SiteFinder& finder, Value* sum) {
  const auto reader = only_reader_behind_passive(sum);
  return reader && is_tensor_add(reader->user) && is_vector(finder, reader->user->input(1 - reader->offset));
}

// Whether a bias stands beside the residual `stream`, (x + bias) + product, in the operand of the add.
bool adds_bias_before(SiteFinder& finder, Value* operand, Value* stream) {
  if (operand == stream || !is_tensor_add(operand->node())) {
    return false;
  }
  const auto terms = operand->node()->inputs().slice(0, 2);
  return std::any_of(terms.begin(), terms.end(),
                     [&](Value* term) { return is_vector(finder, term) || adds_bias_before(finder, term, stream); });
}

// Whether the linear map that `value` is has a bias.
bool has_bias(Value* value) {
  const Node* node = value->node();
  return is_aten(node, {"linear"}) ? !is_none(node->namedInput("bias")) : is_linear(node);
}

}  // namespace

std::optional<ResidualSite> find_residual(SiteFinder& finder, Value* branch, Value* block_input) {
  bool is_whole = has_bias(branch);  // the branch is: no bias of its own is added elsewhere
  for (auto reader = only_reader(branch);; reader = only_reader(branch)) {
    if (!reader) {
      return std::nullopt;
    }
    Node* node = reader->user;
    const bool passes = is_layout(node) || is_aten(node, {"dropout"}) || is_norm(node) ||
                        finder.is_scale(node, branch) || (node->kind() == c10::prim::If && node->outputs().size() == 1);
    const bool adds_bias =  // of a linear map that was written as a product and a sum
        is_tensor_add(node) && resolve_tensor(strip_layout(node->input(1 - reader->offset)), finder.module()).defined();
    if (is_tensor_add(node) && !adds_bias) {
      break;
    }
    if ((!passes && !adds_bias) || node->outputs().size() != 1) {
      return std::nullopt;
    }
    is_whole = is_whole || adds_bias;
    branch = node->output();
  }
  const auto first = only_reader(branch);
  ResidualSite site;
  site.add = first->user;
  site.branch_operand = first->offset;
  site.sum = site.add;
  site.residual = site.add->input(1 - site.branch_operand);
  const auto streams = streams_of(block_input);
  Value* stream = stream_in(site.residual, streams);
  for (Node* add = site.add; !stream;) {
    const auto next = only_reader_behind_passive(add->output());
    if (!next || !is_tensor_add(next->user)) {  // no add brings in the stream: the nearest one is the residual add
      site.sum = site.add;
      stream = site.residual;
      break;
    }
    add = next->user;
    if (!is_whole && is_vector(finder, add->input(1 - next->offset))) {  // (product + another branch) + bias
      return std::nullopt;
    }
    site.sum = add;
    stream = stream_in(add->input(1 - next->offset), streams);
  }
  const bool lacks_bias = !is_whole && (adds_bias_behind(finder, site.sum->output()) ||
                                        adds_bias_before(finder, site.add->input(1 - site.branch_operand), stream));
  if (lacks_bias) {
    return std::nullopt;
  }
  site.residual = stream;
  if (!finder.layout_of(site.sum->output(), site.sequence_first)) {
    return std::nullopt;
  }
  return site;
}

void find_attention_residual(SiteFinder& finder, Layer& layer, LayerSites& sites) {
  sites.output = finder.linear_behind(sites.attention->output(), /*through_any_op=*/false);
  if (!sites.output) {
    layer.notes.emplace_back("no output projection follows the attention");
    return;
  }
  find_output_residual(finder, layer, sites);
}

void find_output_residual(SiteFinder& finder, Layer& layer, LayerSites& sites) {
  layer.output = finder.describe(sites.output->node);
  sites.output->is_flat = !finder.layout_of(linear_input(sites.output->node), sites.output->sequence_first);
  Value* input = linear_input(sites.query.node);
  sites.attention_residual = find_residual(finder, sites.output->node->output(), input);
  if (!sites.attention_residual) {
    layer.notes.push_back("no residual add follows " + layer.output->path);
    return;
  }
  ResidualSite& residual = *sites.attention_residual;
  layer.has_attention_residual = true;
  layer.norm_order = norm_order(input, residual.residual);
  residual.norm = layer.norm_order == NormOrder::kPost ? norm_after(residual.sum->output()) : nullptr;
  if (!residual.norm && layer.norm_order == NormOrder::kPost) {
    layer.norm_order = NormOrder::kNone;
  }
}

}  // namespace torchgraft
