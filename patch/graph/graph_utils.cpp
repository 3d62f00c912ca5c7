#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>

#include <torchgraft/patch/graph/linear_map.h>

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

std::optional<ModuleAttribute> resolve_attribute(const Value* value, const Module& root) {
  std::vector<std::string> names;
  while (value->node()->kind() == c10::prim::GetAttr) {
    names.push_back(value->node()->s(c10::attr::name));
    value = value->node()->input();
  }
  const Graph* graph = value->owningGraph();
  if (graph->inputs().empty() || value != graph->inputs()[0]) {
    return std::nullopt;
  }
  ModuleAttribute result{"", root._ivalue()};
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    if (!result.value.isObject() || !result.value.toObjectRef().type()->findAttributeSlot(*name)) {
      return std::nullopt;
    }
    result.value = result.value.toObjectRef().getAttr(*name);
    result.path += (result.path.empty() ? "" : ".") + *name;
  }
  return result;
}

at::Tensor resolve_tensor(const Value* value, const Module& root) {
  if (const auto constant = torch::jit::toIValue(value)) {
    return constant->isTensor() ? constant->toTensor() : at::Tensor();
  }
  const auto attribute = resolve_attribute(value, root);
  return attribute && attribute->value.isTensor() ? attribute->value.toTensor() : at::Tensor();
}

const void* WeightSource::identity() const {
  return packed ? static_cast<const void*>(packed.get()) : tensor.defined() ? tensor.data_ptr() : nullptr;
}

namespace {

// The first row of a slice or narrow; nullopt when it is computed, or counted from the end.
std::optional<int64_t> start_of(const Node* slice) {
  const Value* start = slice->namedInput("start");
  const auto first = is_none(start) ? 0 : constant_int(start);
  return first && *first >= 0 ? first : std::nullopt;
}

// The rows of `whole` before `piece`, which `split` makes; nullopt when their number is computed.
std::optional<int64_t> rows_before_piece(const Value* piece, const Node* split, const at::Tensor& whole) {
  const bool by_index = piece->node()->kind() == c10::aten::__getitem__;
  const auto index = by_index ? constant_int(piece->node()->input(1)) : static_cast<int64_t>(piece->offset());
  if (!index || *index < 0) {
    return std::nullopt;
  }
  const auto sizes = resolve_constant(split->input(1));
  const Node* list = split->input(1)->node();
  int64_t rows = 0;
  if (sizes && sizes->isIntList()) {
    for (int64_t i = 0; i < *index; ++i) {
      rows += sizes->toIntVector().at(i);
    }
    return rows;
  }
  if (list->kind() == c10::prim::ListConstruct) {
    for (int64_t i = 0; i < *index; ++i) {
      const auto size = constant_int(list->input(i));
      if (!size) {
        return std::nullopt;
      }
      rows += *size;
    }
    return rows;
  }
  const auto count = constant_int(split->input(1));
  if (!count) {
    return std::nullopt;
  }
  const bool chunks = is_aten(split, {"chunk"});
  return *index * (chunks ? (whole.size(0) + *count - 1) / *count : *count);
}

// Where `weight` is an object that holds a packed weight.
std::optional<WeightSource> packed_source(const Value* weight, const Module& root) {
  if (weight->type()->kind() != c10::TypeKind::ClassType) {
    return std::nullopt;
  }
  const auto constant = torch::jit::toIValue(weight);
  const auto attribute = constant ? ModuleAttribute{"", *constant} : resolve_attribute(weight, root);
  if (!attribute || !is_packed_object(attribute->value)) {
    return std::nullopt;
  }
  WeightSource result;
  result.path = attribute->path;
  result.packed = attribute->value.toObject();
  return result;
}

}  // namespace

WeightSource weight_source(const Value* weight, const Module& root) {
  const Node* node = weight->node();
  if (const at::Tensor tensor = resolve_tensor(weight, root); tensor.defined()) {
    const auto attribute = resolve_attribute(weight, root);
    return {tensor, attribute ? attribute->path : ""};
  }
  if (const auto packed = packed_source(weight, root)) {
    return *packed;
  }
  if (is_layout(node) || is_aten(node, {"t", "numpy_T"})) {
    WeightSource source = weight_source(node->input(0), root);
    const bool keeps_rows = is_aten(node, {"contiguous", "clone", "to", "type_as", "alias", "detach"});
    return source.is_part && !keeps_rows ? WeightSource() : source;
  }
  // Some of the rows: one piece of a split, or a slice.
  const bool is_piece = node->kind() == c10::prim::ListUnpack || node->kind() == c10::aten::__getitem__;
  const Node* split = is_piece ? node->input(0)->node() : node;
  if (!is_aten(split, {"chunk", "split", "split_with_sizes", "slice", "narrow"})) {
    return {};
  }
  const bool is_slice = is_aten(split, {"slice", "narrow"});
  if (is_slice == is_piece || constant_int(split->namedInput("dim")) != 0) {
    return {};
  }
  WeightSource source = weight_source(split->namedInput("self"), root);
  if (!source.tensor.defined()) {
    return {};
  }
  source.is_part = true;
  const auto before = is_slice ? start_of(split) : rows_before_piece(weight, split, source.tensor);
  source.first_row = source.first_row && before ? std::optional(*source.first_row + *before) : std::nullopt;
  return source;
}

std::optional<c10::IValue> resolve_constant(const Value* value) {
  const auto kind = value->node()->kind();
  if (kind == c10::prim::NumToTensor || kind == c10::aten::Int || kind == c10::aten::Float ||
      kind == c10::aten::IntImplicit || kind == c10::aten::FloatImplicit || kind == c10::aten::ScalarImplicit) {
    return resolve_constant(value->node()->input());
  }
  return torch::jit::toIValue(value);
}

std::optional<int64_t> constant_int(const Value* value) {
  const auto constant = resolve_constant(value);
  if (!constant) {
    return std::nullopt;
  }
  if (constant->isInt()) {
    return constant->toInt();
  }
  const bool integral_tensor = constant->isTensor() && constant->toTensor().numel() == 1 &&
                               at::isIntegralType(constant->toTensor().scalar_type(), /*includeBool=*/false);
  return integral_tensor ? std::optional<int64_t>(constant->toTensor().item<int64_t>()) : std::nullopt;
}

std::optional<double> constant_double(const Value* value) {
  const auto constant = resolve_constant(value);
  if (!constant) {
    return std::nullopt;
  }
  if (constant->isDouble() || constant->isInt()) {
    return constant->toScalar().toDouble();
  }
  const bool scalar_tensor = constant->isTensor() && constant->toTensor().numel() == 1;
  return scalar_tensor ? std::optional<double>(constant->toTensor().item<double>()) : std::nullopt;
}

bool is_none(const Value* value) { return value->mustBeNone(); }

std::string demangled_name(const c10::TypePtr& type) {
  const auto class_type = type->cast<c10::ClassType>();
  if (!class_type || !class_type->name()) {
    return "";
  }
  std::string result;
  for (const std::string& atom : class_type->name()->atoms()) {
    if (atom == "__torch__" || atom.rfind("___torch_mangle_", 0) == 0) {
      continue;
    }
    result += (result.empty() ? "" : ".") + atom;
  }
  return result;
}

bool is_aten(const Node* node, std::initializer_list<const char*> names) {
  if (!node->kind().is_aten()) {
    return false;
  }
  std::string name = node->kind().toUnqualString();
  if (is_in_place(node)) {
    name.pop_back();
  }
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool is_in_place(const Node* node) {
  const std::string name = node->kind().toUnqualString();
  return node->kind().is_aten() && name.size() > 1 && name.back() == '_' && name[name.size() - 2] != '_';
}

bool is_tensor(const Value* value) { return value->type()->isSubtypeOf(*c10::TensorType::get()); }

bool has_unit_alpha(const Node* sum) {
  return sum->inputs().size() < 3 || constant_double(sum->namedInput("alpha")) == 1.0;
}

bool is_whole_slice(const Node* node) {
  if (!is_aten(node, {"slice"}) || !is_tensor(node->input(0))) {
    return false;
  }
  const Value* start = node->namedInput("start");
  const Value* end = node->namedInput("end");
  const bool from_first = is_none(start) || constant_int(start) == 0;
  const bool to_last = is_none(end) || constant_int(end) == std::numeric_limits<int64_t>::max();
  return from_first && to_last && constant_int(node->namedInput("step")) == 1;
}

bool is_inside(const Node* node, const Block* block) {
  for (const Block* at = node->owningBlock(); at; at = at->owningNode() ? at->owningNode()->owningBlock() : nullptr) {
    if (at == block) {
      return true;
    }
  }
  return false;
}

bool is_elementwise(const Node* node) {
  return is_aten(
      node,
      {"abs",         "alias", "ceil",        "celu",      "clamp",      "clamp_max",  "clamp_min", "clone",
       "contiguous",  "cos",   "detach",      "dropout",   "elu",        "erf",        "exp",       "feature_dropout",
       "floor",       "gelu",  "hardsigmoid", "hardswish", "hardtanh",   "leaky_relu", "log",       "log1p",
       "logical_not", "mish",  "neg",         "pow",       "reciprocal", "relu",       "relu6",     "round",
       "rsqrt",       "selu",  "sigmoid",     "sign",      "silu",       "sin",        "softplus",  "sqrt",
       "square",      "tanh",  "to",          "type_as",   "bitwise_not"});
}

bool is_softmax(const Node* node) { return is_aten(node, {"softmax", "_softmax", "special_softmax"}); }

bool writes_tokens(const Node* node) { return is_aten(node, {"index_copy", "index_put", "scatter", "slice_scatter"}); }

at::ArrayRef<Value*> joined_tensors(Node* node) {
  const bool joins = is_aten(node, {"cat", "concat", "stack"});
  Node* list = joins ? node->namedInput("tensors")->node() : nullptr;
  return list && list->kind() == c10::prim::ListConstruct ? list->inputs() : at::ArrayRef<Value*>();
}

void for_each_node(Block* block, const std::function<void(Node*)>& visit) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it;
    for (Block* inner : node->blocks()) {
      for_each_node(inner, visit);
    }
    ++it;  // before visit: it may destroy the node
    visit(node);
  }
}

std::vector<Use> data_uses(const Value* value) {
  std::vector<Use> result;
  for (const Use& use : value->uses()) {
    const bool metadata = is_aten(use.user, {"size", "dim", "len", "is_floating_point", "numel"}) ||
                          use.user->kind() == c10::prim::dtype || use.user->kind() == c10::prim::device;
    const bool takes_form = is_aten(use.user, {"type_as", "expand_as", "view_as", "reshape_as"}) && use.offset == 1;
    if (!metadata && !takes_form) {
      result.push_back(use);
    }
  }
  return result;
}

std::vector<Node*> nearest_linears(Value* value) {
  std::vector<Node*> found;
  std::unordered_set<Value*> seen;
  std::deque<Value*> queue = {value};
  while (!queue.empty()) {
    Value* current = queue.front();
    queue.pop_front();
    Node* node = current->node();
    const bool is_list = current->type()->kind() == c10::TypeKind::ListType;
    if (!seen.insert(current).second || !(is_tensor(current) || is_list) ||
        is_aten(node, {"scaled_dot_product_attention"})) {
      continue;
    }
    if (is_linear(node)) {
      found.push_back(node);
      continue;
    }
    if (node->kind() == c10::prim::If) {  // `if past is not None:`
      for (Block* block : node->blocks()) {
        queue.push_back(block->outputs()[current->offset()]);
      }
      continue;
    }
    const bool shaped_like = is_aten(node, {"type_as", "expand_as", "view_as", "zeros_like", "ones_like"});
    for (Value* input : shaped_like ? node->inputs().slice(0, 1) : node->inputs()) {
      queue.push_back(input);
    }
  }
  return found;
}

bool is_layout(const Node* node) {
  return is_aten(node, {"view", "reshape", "_unsafe_view", "transpose", "permute", "contiguous", "flatten", "unflatten",
                        "unsqueeze", "squeeze", "clone", "to", "type_as", "alias", "detach"});
}

Value* strip_passive(Value* value) {
  while (is_layout(value->node()) || is_aten(value->node(), {"dropout"})) {
    value = value->node()->input(0);
  }
  return value;
}

Value* strip_layout(Value* value) {
  while (is_layout(value->node())) {
    value = value->node()->input(0);
  }
  return value;
}

std::vector<Value*> insert_graph_before(Node* node, Graph& body, at::ArrayRef<Value*> inputs) {
  TORCH_INTERNAL_ASSERT(inputs.size() == body.inputs().size(), "a body of ", body.inputs().size(), " inputs got ",
                        inputs.size());
  torch::jit::WithInsertPoint guard(node);
  return torch::jit::insertGraph(*node->owningGraph(), body, inputs);
}

void replace_node(Node* node, at::ArrayRef<Value*> values) {
  TORCH_INTERNAL_ASSERT(node->outputs().size() == values.size(), "a node of ", node->outputs().size(), " outputs got ",
                        values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    node->outputs()[i]->replaceAllUsesWith(values[i]);
  }
  node->destroy();
}

std::shared_ptr<Graph> compile_graph(const std::string& source, const std::string& name) {
  // Inlined nodes point to the function that they came from, and error messages read it. So a unit has to outlive every
  // graph: units live as long as the process. There are few sources.
  static std::mutex mutex;
  static auto* units = new std::map<std::string, torch::jit::CompilationUnit>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [unit, is_new] = units->try_emplace(source);
  if (is_new) {
    unit->second.define(std::nullopt, source, torch::jit::nativeResolver(), /*self=*/nullptr);
  }
  auto graph = torch::jit::toGraphFunction(unit->second.get_function(name)).graph()->copy();
  inline_all(*graph);
  return graph;
}

}  // namespace torchgraft
