#include <torchgraft/patch/text_limits.h>

#include <torchgraft/patch/forward_inputs.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/module/methods.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// Where ids come from, before nodes that change their shape or dtype.
const Value* ids_origin(const Value* value) {
  while (is_aten(value->node(), {"to", "view", "reshape", "contiguous"})) {
    value = value->node()->namedInput("self");
  }
  return value;
}

constexpr size_t kMostNodes = 500;  // positions are computed from a length, not from hidden states

// Collects what `value` is computed from. False where that is not known from the text alone: control flow, random
// numbers, effects, or a tensor that something writes into.
bool collect(const Value* value, const Writes& writes, std::set<const Node*>& nodes) {
  const Node* node = value->node();
  if (node->kind() == c10::prim::Param || !nodes.insert(node).second) {
    return true;
  }
  const auto* schema = node->maybeSchema();
  const bool is_known = nodes.size() <= kMostNodes && node->blocks().empty() && !node->hasSideEffects() &&
                        !node->isNondeterministic() && !(schema && schema->is_mutable()) &&
                        node->owningBlock() == node->owningGraph()->block();
  return is_known && !(is_tensor(value) && writes.reach(value)) &&
         std::all_of(node->inputs().begin(), node->inputs().end(),
                     [&](const Value* input) { return collect(input, writes, nodes); });
}

// The part of a forward that computes the indices of a table, alone.
class IndexPart {
 public:
  IndexPart(const Graph& forward, const Value* indices, const std::set<const Node*>& nodes, const Module& module,
            const ForwardInputs& inputs, const c10::FunctionSchema& schema)
      : module_(module), inputs_(inputs), schema_(schema) {
    auto graph = std::make_shared<Graph>();
    std::map<const Value*, Value*> copies;
    for (const Value* input : forward.inputs()) {
      copies[input] = graph->addInput()->copyMetadata(const_cast<Value*>(input));
    }
    for (const Node* node : forward.nodes()) {
      if (nodes.count(node)) {
        Node* copy = graph->createClone(const_cast<Node*>(node), [&](Value* value) { return copies.at(value); });
        graph->insertNode(copy);
        for (size_t i = 0; i < node->outputs().size(); ++i) {
          copies[node->output(i)] = copy->output(i);
        }
      }
    }
    graph->registerOutput(copies.at(indices));
    code_ = std::make_unique<torch::jit::Code>(graph, "text_limits");
  }

  // For one text of `length` tokens, whose ids are `id`. Throws what the graph throws.
  at::Tensor run(int64_t length, int64_t id) const {
    const at::Tensor ids = at::full({1, length}, id, at::kLong);
    torch::jit::Stack stack = {module_._ivalue()};
    for (const c10::IValue& argument : inputs_.arguments({ids, at::ones_like(ids), at::zeros_like(ids)})) {
      stack.push_back(argument);
    }
    while (stack.size() < schema_.arguments().size()) {
      stack.push_back(schema_.arguments()[stack.size()].default_value().value_or(c10::IValue()));
    }
    torch::jit::InterpreterState(*code_).run(stack);
    return stack.front().toTensor();
  }

 private:
  const Module& module_;
  const ForwardInputs& inputs_;
  const c10::FunctionSchema& schema_;
  std::unique_ptr<torch::jit::Code> code_;
};

// Whether a text of `length` tokens has an index in a table of `rows` rows for each of its tokens.
bool fits(const IndexPart& part, int64_t length, int64_t id, int64_t rows) {
  try {
    const at::Tensor indices = part.run(length, id);
    return indices.numel() == length && indices.min().item<int64_t>() >= 0 && indices.max().item<int64_t>() < rows;
  } catch (const std::exception&) {  // a buffer of positions that ends before the text
    return false;
  }
}

// The largest number of tokens, all of them `id`, that has positions in a table of `rows` rows; nullopt where the table
// holds no positions of tokens.
std::optional<int64_t> most_tokens_of(const IndexPart& part, int64_t id, int64_t rows) {
  constexpr int64_t kProbe = 3;
  if (!fits(part, kProbe, id, rows) || fits(part, rows + 1, id, rows)) {
    return std::nullopt;
  }
  int64_t fitting = kProbe;
  int64_t failing = rows + 1;
  while (failing - fitting > 1) {
    const int64_t middle = fitting + (failing - fitting) / 2;
    (fits(part, middle, id, rows) ? fitting : failing) = middle;
  }
  return fitting;
}

// The same for texts of any tokens. Tokens may have a meaning for the table: one that pads has no position of its own,
// and one that separates begins a new segment, whose number is no position. So texts of several tokens are asked, and
// all but one must have the same limit, the one that pads.
std::optional<int64_t> most_tokens(const IndexPart& part, std::optional<int64_t> vocabulary, int64_t rows) {
  const int64_t last = vocabulary.value_or(8) - 1;  // ids that any tokenizer has
  std::set<int64_t> found;
  size_t without = 0;
  const std::set<int64_t> ids = {0, 1, last / 4, last / 2, last - last / 4, last - 1, last};
  for (const int64_t id : ids) {
    const auto most = id < 0 ? std::nullopt : most_tokens_of(part, id, rows);
    without += most ? 0 : 1;
    if (most) {
      found.insert(*most);
    }
    if (found.size() > 1 || without > 1) {
      return std::nullopt;
    }
  }
  return found.empty() ? std::nullopt : std::optional(*found.begin());
}

std::string method_of_base(const Module& module) { return is_grafted(module) ? "base_forward" : "forward"; }

std::optional<ForwardInputs> inputs_of_text(const Module& module) {
  try {
    return ForwardInputs(module, method_of_base(module));
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

}  // namespace

std::optional<int64_t> rows_indexed_by(const Module& module, size_t argument) {
  const auto& function = module.get_method(method_of_base(module)).function();
  auto graph = torch::jit::toGraphFunction(function).graph()->copy();
  inline_all(*graph);
  torch::jit::ConstantPropagation(graph);  // a scripted nn.Embedding asks whether it has a padding index
  std::optional<int64_t> rows;
  for (const Node* node : graph->nodes()) {  // those in blocks may not run
    if (is_aten(node, {"embedding"}) && argument < graph->inputs().size() &&
        ids_origin(node->namedInput("indices")) == graph->inputs()[argument]) {
      const at::Tensor table = resolve_tensor(node->namedInput("weight"), module);
      rows = table.defined() ? std::min(rows.value_or(table.size(0)), table.size(0)) : rows;
    }
  }
  return rows;
}

TextLimits text_limits(const Module& module) {
  const std::string method = method_of_base(module);
  const ForwardInputs inputs(module, method);
  const auto& function = module.get_method(method).function();
  const at::NoGradGuard no_grad;
  const auto graph = torch::jit::toGraphFunction(function).graph()->copy();
  inline_all(*graph);
  TextLimits limits;
  std::vector<Node*> tables;  // of other things than token ids
  for_each_node(graph->block(), [&](Node* node) {
    if (!is_aten(node, {"embedding"})) {
      return;
    }
    const Value* origin = ids_origin(node->namedInput("indices"));
    if (origin == graph->inputs()[inputs.ids_position()]) {
      const at::Tensor table = resolve_tensor(node->namedInput("weight"), module);
      if (table.defined() && node->owningBlock() == graph->block()) {  // others may not run
        limits.vocabulary = std::min(limits.vocabulary.value_or(table.size(0)), table.size(0));
      }
    } else if (origin->node()->kind() != c10::prim::Param) {
      tables.push_back(node);
    }
  });
  const Writes writes(graph);
  for (Node* node : tables) {
    const at::Tensor table = resolve_tensor(node->namedInput("weight"), module);
    Value* indices = node->namedInput("indices");
    std::set<const Node*> nodes;
    if (!table.defined() || !collect(indices, writes, nodes)) {
      continue;
    }
    const IndexPart part(*graph, indices, nodes, module, inputs, function.getSchema());
    const auto most = most_tokens(part, limits.vocabulary, table.size(0));
    limits.positions = most ? std::min(limits.positions.value_or(*most), *most) : limits.positions;
  }
  return limits;
}

std::optional<TextFault> text_fault(const TextLimits& limits, at::IntArrayRef ids) {
  const auto tokens = static_cast<int64_t>(ids.size());
  if (limits.positions && tokens > *limits.positions) {
    return TextFault{true, c10::str("expected at most ", *limits.positions,
                                    " tokens in a row, which the model has positions for, got ", tokens)};
  }
  const auto is_wrong = [&](int64_t id) { return limits.vocabulary && (id < 0 || id >= *limits.vocabulary); };
  const auto wrong = std::find_if(ids.begin(), ids.end(), is_wrong);
  if (wrong == ids.end()) {
    return std::nullopt;
  }
  return TextFault{false, c10::str("expected token ids from 0 and below ", *limits.vocabulary,
                                   ", which the model has, got ", *wrong)};
}

void check_texts(const Module& module, const std::vector<c10::IValue>& arguments, const char* what) {
  const auto inputs = inputs_of_text(module);
  const size_t place = inputs ? inputs->ids_position() - 1 : 0;
  if (!inputs || place >= arguments.size() || !arguments[place].isTensor()) {
    return;
  }
  const at::Tensor& ids = arguments[place].toTensor();
  if (ids.dim() != 2 || ids.numel() == 0 || !at::isIntegralType(ids.scalar_type(), /*includeBool=*/false)) {
    return;
  }
  const TextLimits limits = text_limits(module);
  const at::Tensor rows = ids.to(at::kCPU, at::kLong).contiguous();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    const auto fault = text_fault(limits, at::IntArrayRef(rows.const_data_ptr<int64_t>() + row * rows.size(1),
                                                          static_cast<size_t>(rows.size(1))));
    TORCH_CHECK(!fault, what, ": row ", row, ": ", fault->message);
  }
}

}  // namespace torchgraft
