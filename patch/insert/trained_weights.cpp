#include <torchgraft/patch/insert/trained_weights.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/graph/activation_source.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/sites/base_weight.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/reft_weights.h>

#include <algorithm>

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

// As orthogonal_matrix() in plan/reft_weights.h; 3 is torch.int32.
std::string orthogonal_source(int64_t rows, int64_t columns) {
  const std::string flipped = rows < columns ? ".t()" : "";
  const std::string square = R"python(
    lower = torch.tril(tall)
    columns = torch.linalg_matrix_exp(lower - lower.t()))python";
  const std::string householder = R"python(
    reflectors = torch.tril(tall, -1)
    tau = 2.0 / (1.0 + (reflectors * reflectors).sum([-2]))
    signs = torch.diagonal(tall, 0, -2, -1).to(3)
    columns = torch.linalg_householder_product(reflectors, tau) * signs.unsqueeze(-2))python";
  return "def orthogonal_matrix(original: Tensor, base: Tensor) -> Tensor:\n    tall = original" + flipped +
         (rows == columns ? square : householder) + "\n    return torch.matmul(base, columns)" + flipped + "\n";
}

}  // namespace

Value* TrainedWeights::dropped(Value* value, double p) {
  return p == 0.0 ? value : graph_.insert(c10::aten::dropout, {value, p, graph_.insertGetAttr(adapters_, "training")});
}

// A tensor that weights are computed from; `key` is that of the Reparametrisation.
Value* TrainedWeights::source(const OwnWeights& own, const std::string& key, const std::string& name) {
  Value* container = graph_.insertGetAttr(adapters_, key + kSourceSuffix);
  return graph_.insertGetAttr(graph_.insertGetAttr(container, own_module_name(own.name)), name);
}

// Dropout differs from the adapters library, which drops keys and values row by row: here all rows of a batch share it.
Value* TrainedWeights::prefix_states(const OwnWeights& own) {
  const auto& prefix = std::get<PlannedPrefix>(own.module.method);
  Value*& states = states_[{own.name, prefix.pool}];
  if (states) {
    return states;
  }
  std::vector<Value*> inputs;
  for (const char* name : {"embeddings", "down_weight", "down_bias", "up_weight", "up_bias"}) {
    inputs.push_back(source(own, prefix.pool, name));
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

// [out, in], as in plan/phm.h. The sum over i of kron(rules[i], blocks[i]) is one product of [n n, n] and
// [n, in / n out / n].
Value* TrainedWeights::phm_weight(const OwnWeights& own, const std::string& side) {
  const auto& bottleneck = std::get<PlannedBottleneck>(own.module.method);
  const BnConfig& config = bottleneck.config;
  const auto factor = [&](const std::string& name, bool shared) {
    const PhmSource kept = phm_place(own.module, side, name, shared);
    return source(own, kept.source, kept.name);
  };
  const auto whole = [&](const std::string& name, bool is_product, bool shared) {
    return is_product ? graph_.insert(c10::aten::bmm, {factor(name + "_left", shared), factor(name + "_right", shared)})
                      : factor(name, shared);
  };
  static const auto body = compile_graph(R"python(
def phm_weight(rules: Tensor, blocks: Tensor) -> Tensor:
    n, rows, columns = blocks.size(0), blocks.size(1), blocks.size(2)
    products = torch.matmul(rules.reshape(n, n * n).t(), blocks.reshape(n, rows * columns))
    return products.view(n, n, rows, columns).permute(1, 3, 0, 2).reshape(n * columns, n * rows)
)python",
                                         "phm_weight");
  Value* rules = whole("phm_rule", config.factorized_phm_rule, config.shared_phm_rule);
  Value* blocks = whole("W", config.factorized_phm_W, config.shared_W_phm);
  return torch::jit::insertGraph(graph_, *body, {rules, blocks})[0];
}

// lora_a or lora_b, as in plan/lora_factors.h.
Value* TrainedWeights::factored(const OwnWeights& own, const std::string& name) {
  const std::string key = lora_factors_key(own.module);
  if (name == "lora_a") {
    return source(own, kSharedVera, "lora_A");
  }
  if (lora_factors(own.module) == LoRAFactors::kVera) {
    Value* right = graph_.insert(c10::aten::matmul, {source(own, kSharedVera, "lora_B"), source(own, key, "vera_d")});
    return graph_.insert(c10::aten::matmul, {source(own, key, "vera_b"), right});
  }
  static const auto body = compile_graph(R"python(
def task_update(task_b: Tensor, task_values: Tensor, task_weights: Tensor, sharpness: float) -> Tensor:
    shares = torch.softmax(task_weights / sharpness, 0)
    return (shares.view(-1, 1, 1) * task_b).sum(0) * task_values
)python",
                                         "task_update");
  const double sharpness = std::get<PlannedLoRA>(own.module.method).config.weights_sharpness;
  return torch::jit::insertGraph(graph_, *body,
                                 {source(own, key, "task_b"), source(own, key, "task_values"),
                                  source(own, key, "task_weights"), graph_.insertConstant(sharpness)})[0];
}

// [U, r, H], from its sources.
Value* TrainedWeights::reft_projection(const OwnWeights& own) {
  const auto& reft = std::get<PlannedReft>(own.module.method);
  const auto body = compile_graph(orthogonal_source(reft.config.r, reft.hidden_size), "orthogonal_matrix");
  std::vector<Value*> units;
  for (int64_t unit = 0; unit < reft_units(reft.config); ++unit) {
    const auto of = [&](const char* name) {
      return source(own, reft_source(own.module), std::string(name) + "_" + std::to_string(unit));
    };
    Value* original = of("original");
    units.push_back(torch::jit::insertGraph(graph_, *body, {original, of("base")})[0]);
  }
  Value* list = graph_.insertNode(graph_.createList(c10::TensorType::get(), units))->output();
  return graph_.insert(c10::aten::stack, {list, 0});
}

// [out]: the norms of the rows of W + B A, as in adapters/dora.cpp.
Value* TrainedWeights::weight_norm(const Slot& slot, const OwnWeights& own, Value* slot_module) {
  const auto& lora = std::get<PlannedLoRA>(own.module.method);
  const LinearSite& site = *lora_site(sites_.layers.at(sites_.structure.position(slot.layer)), slot.site);
  Value* weight = insert_rows(graph_, base_weight(site, root_), site, lora.out_features);
  const auto matrix = [&](const char* name) {
    return own.computed.count(name)
               ? factored(own, name)
               : graph_.insertGetAttr(graph_.insertGetAttr(slot_module, own_module_name(own.name)), name);
  };
  Value* a = matrix("lora_a");
  Value* b = matrix("lora_b");
  Value* updated = graph_.insert(c10::aten::add, {weight, graph_.insert(c10::aten::matmul, {b, a})});
  const std::vector<int64_t> of_rows = {1};
  Value* norm = graph_.insert(c10::aten::linalg_vector_norm, {updated, 2, of_rows});
  return graph_.insert(c10::aten::type_as, {norm, b});
}

// One of computed_weights().
Value* TrainedWeights::computed_row(const Slot& slot, const OwnWeights& own, const std::string& name,
                                    Value* slot_module) {
  if (name == "weight_norm") {
    return weight_norm(slot, own, slot_module);
  }
  if (std::holds_alternative<PlannedLoRA>(own.module.method)) {
    return factored(own, name);
  }
  if (std::holds_alternative<PlannedBottleneck>(own.module.method)) {
    return phm_weight(own, name == "down_weight" ? "down" : "up");
  }
  if (std::holds_alternative<PlannedReft>(own.module.method)) {
    return reft_projection(own);
  }
  return prefix_of_layer(own, name == "prefix_value");
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

Value* TrainedWeights::own_row(const Slot& slot, const OwnWeights& own, const std::string& name, Value* slot_module) {
  const auto wanted = slot.parameters.at(name).sizes().slice(1);
  Value* row = nullptr;
  std::vector<int64_t> sizes;
  if (own.computed.count(name)) {
    row = computed_row(slot, own, name, slot_module);
    sizes = own.computed.at(name);
  } else if (const auto found = own.parameters.find(name); found != own.parameters.end()) {
    row = graph_.insertGetAttr(graph_.insertGetAttr(slot_module, own_module_name(own.name)), name);
    sizes = found->second.sizes().vec();
    const auto* prefix = std::get_if<PlannedPrefix>(&own.module.method);
    row = prefix && name.starts_with("prefix_") ? dropped(row, prefix->config.dropout) : row;
  }
  return row ? graph_.insert(c10::aten::unsqueeze, {padded(row, sizes, wanted, name), 0}) : nullptr;
}

Value* TrainedWeights::bank(const Slot& slot, const std::string& name) {
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
  TORCH_INTERNAL_ASSERT(bank, "no adapter has the parameter ", name, " in the slot ", slot.name);
  return bank;
}

}  // namespace torchgraft
