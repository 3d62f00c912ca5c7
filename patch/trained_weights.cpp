#include <torchgraft/patch/trained_weights.h>

#include <torchgraft/patch/activation_source.h>
#include <torchgraft/patch/graph_utils.h>

namespace torchgraft {

using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// As eject() in plan/prefix_mlp.h. The result is [P, 2 L, h, d]: keys of layer i at 2 i, values at 2 i + 1.
std::string mlp_source(const std::string& non_linearity) {
  return R"python(
def prefix_states(embeddings: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
                  parts: int, heads: int) -> Tensor:
    inner = torch.linear(embeddings, down_weight, down_bias)
    states = torch.linear()python" +
         activation_source(non_linearity) + R"python(, up_weight, up_bias)
    return states.view(embeddings.size(0), parts, heads, -1)
)python";
}

}  // namespace

Value* TrainedWeights::dropped(Value* value, double p) {
  return p == 0.0 ? value
                  : graph_.insert(c10::aten::dropout, {value, p, graph_.insertGetAttr(adapters_, "training")});
}

// The library drops each row's keys and values by themselves; here the rows of a batch share what is dropped.
Value* TrainedWeights::prefix_states(const OwnWeights& own) {
  Value*& states = states_[{own.name, own.module.location}];
  if (states) {
    return states;
  }
  const auto& prefix = std::get<PlannedPrefix>(own.module.method);
  Value* mlp = graph_.insertGetAttr(graph_.insertGetAttr(adapters_, own.module.location + kMlpSuffix),
                                    own_module_name(own.name));
  std::vector<Value*> inputs;
  for (const char* name : {"embeddings", "down_weight", "down_bias", "up_weight", "up_bias"}) {
    inputs.push_back(graph_.insertGetAttr(mlp, name));
  }
  inputs.push_back(graph_.insertConstant(2 * prefix.group_size));
  inputs.push_back(graph_.insertConstant(prefix.num_kv_heads));
  const auto body = compile_graph(mlp_source(prefix.config.non_linearity), "prefix_states");
  states = dropped(torch::jit::insertGraph(graph_, *body, inputs)[0], prefix.config.dropout);
  return states;
}

// [h, P, d]
Value* TrainedWeights::prefix_of_layer(const OwnWeights& own, bool is_value) {
  const auto& prefix = std::get<PlannedPrefix>(own.module.method);
  Value* part = graph_.insert(c10::aten::select, {prefix_states(own), 1, 2 * prefix.group_index + is_value});
  return graph_.insert(c10::aten::transpose, {part, 0, 1});
}

Value* TrainedWeights::padded(Value* row, at::IntArrayRef sizes, at::IntArrayRef wanted, const std::string& name) {
  std::vector<int64_t> padding;  // from the last dimension on
  std::vector<int64_t> broadcast;
  for (size_t i = wanted.size(); i-- > 0;) {
    padding.push_back(0);
    padding.push_back(broadcasts(name, static_cast<int64_t>(i)) ? 0 : wanted[i] - sizes[i]);
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    broadcast.push_back(broadcasts(name, static_cast<int64_t>(i)) ? wanted[i] : -1);
  }
  if (std::any_of(padding.begin(), padding.end(), [](int64_t size) { return size != 0; })) {
    row = graph_.insert(c10::aten::constant_pad_nd, {row, padding});
  }
  return sizes == wanted ? row : graph_.insert(c10::aten::expand, {row, broadcast});
}

Value* TrainedWeights::own_row(const BankSlot& slot, const OwnWeights& own, const std::string& name,
                               Value* slot_module) {
  const auto wanted = slot.parameters.at(name).sizes().slice(1);
  Value* row = nullptr;
  std::vector<int64_t> sizes;
  if (own.from_mlp && name.starts_with("prefix_") && name != "prefix_length") {
    const auto& prefix = std::get<PlannedPrefix>(own.module.method);
    row = prefix_of_layer(own, name == "prefix_value");
    sizes = {prefix.num_kv_heads, prefix.config.prefix_length, prefix.head_dim};
  } else if (const auto found = own.parameters.find(name); found != own.parameters.end()) {
    row = graph_.insertGetAttr(graph_.insertGetAttr(slot_module, own_module_name(own.name)), name);
    sizes = found->second.sizes().vec();
    const auto* prefix = std::get_if<PlannedPrefix>(&own.module.method);
    row = prefix && name.starts_with("prefix_") ? dropped(row, prefix->config.dropout) : row;
  }
  return row ? graph_.insert(c10::aten::unsqueeze, {padded(row, sizes, wanted, name), 0}) : nullptr;
}

Value* TrainedWeights::bank(const BankSlot& slot, const std::string& name) {
  const std::string layer = "layer_" + std::to_string(slot.number);
  Value*& bank = banks_[{layer + "." + slot.name, name}];
  if (bank) {
    return bank;
  }
  WithInsertPoint guard(end_);
  Value* module = graph_.insertGetAttr(graph_.insertGetAttr(adapters_, layer), slot.name);
  bank = slot.has_bank(name) ? graph_.insertGetAttr(module, name) : nullptr;
  const int64_t adapters = slot.parameters.at(name).size(0);
  for (const OwnWeights& own : slot.own) {
    Value* row = own_row(slot, own, name, module);
    if (!row) {
      continue;
    }
    if (!bank) {
      bank = row;
      continue;
    }
    const auto index = static_cast<int64_t>(own.adapter);
    Value* before = graph_.insert(c10::aten::narrow, {bank, 0, 0, index});
    Value* behind = graph_.insert(c10::aten::narrow, {bank, 0, index + 1, adapters - index - 1});
    Value* rows = graph_.insertNode(graph_.createList(c10::TensorType::get(), {before, row, behind}))->output();
    bank = graph_.insert(c10::aten::cat, {rows, 0});
  }
  TORCH_INTERNAL_ASSERT(bank, "nobody has ", name, " at ", slot.name);
  return bank;
}

}  // namespace torchgraft
