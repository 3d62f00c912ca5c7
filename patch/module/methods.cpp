#include <torchgraft/patch/module/methods.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/parallel_rows.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/whole_graphs.h>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>

namespace torchgraft {
namespace {

using c10::Argument;
using c10::FunctionSchema;
using torch::jit::Function;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

constexpr const char* kBaseForward = "base_forward";
constexpr const char* kGrafted = "grafted_forward";

constexpr const char* kDelegates = R"python(
def activate(self, name: str) -> None:
    self.adapters.activate(name)

def deactivate(self) -> None:
    self.adapters.deactivate()

def active_adapter(self) -> Optional[str]:
    return self.adapters.active_adapter()

def adapter_names(self) -> List[str]:
    return self.adapters.adapter_names()

def adapter_config(self, name: str) -> str:
    return self.adapters.adapter_config(name)
)python";

// A row of a composition gets the head of an adapter in it: heads[id] is the adapter's id, below -1 where there is
// none.
constexpr const char* kHeadsOfCompositions = R"python(
def head_id(active: int, adapter_ids: Optional[Tensor], heads: List[int]) -> int:
    if adapter_ids is not None:
        return -1
    if active < 0:
        return active
    assert heads[active] >= 0, "forward_with_head: the active composition does not end in an adapter, whose head it " \
        "would have"
    return heads[active]

def head_ids(adapter_ids: Optional[Tensor], heads: List[int]) -> Optional[Tensor]:
    if adapter_ids is None:
        return None
    else:
        table = torch.tensor(heads + [-1]).to(adapter_ids.device)
        chosen = table.index_select(0, torch.remainder(adapter_ids, len(heads) + 1))
        assert bool(chosen.ge(-1).all()), "forward_with_head: the composition of a row does not end in an adapter, " \
            "whose head it would have"
        return chosen
)python";

constexpr const char* kWithHead = "forward_with_head";  // where there are heads

const std::vector<std::string> kAddedMethods = {"forward",        "forward_with_gates", kBaseForward, kGrafted,
                                                kOriginalForward, "activate",           "deactivate", "active_adapter",
                                                "adapter_names",  "adapter_config"};

bool calls_methods(Graph& graph) {
  bool calls = false;
  for_each_node(graph.block(), [&](Node* node) { calls = calls || node->kind() == c10::prim::CallMethod; });
  return calls;
}

std::vector<Argument> with_adapter_ids(const FunctionSchema& schema) {
  std::vector<Argument> arguments = schema.arguments();
  arguments.emplace_back("adapter_ids", c10::OptionalType::ofTensor(), std::nullopt, c10::IValue());
  return arguments;
}

// An empty graph with these inputs, of which the first is self.
std::shared_ptr<Graph> graph_for(const Module& module, const std::vector<Argument>& arguments) {
  auto graph = std::make_shared<Graph>();
  for (const Argument& argument : arguments) {
    const bool is_self = graph->inputs().empty();
    graph->addInput(argument.name())->setType(is_self ? c10::TypePtr(module.type()) : argument.type());
  }
  return graph;
}

Value* insert_method_call(Graph& graph, const Function& method, at::ArrayRef<Value*> inputs,
                          const c10::TypePtr& result) {
  Node* call = graph.create(c10::prim::CallMethod, inputs, 1);
  call->s_(c10::attr::name, method.name());
  call->output()->setType(result);
  return graph.insertNode(call)->output();
}

// kParallelRows in a graph of a module whose compositions have a Parallel; in others it changes nothing.
class ParallelRows {
 public:
  ParallelRows(Graph& graph, const Module& adapters) : graph_(graph), adapters_(adapters) {
    compositions_ = read_compositions(adapters);
    is_needed_ = has_parallel(compositions_);
  }

  explicit operator bool() const { return is_needed_; }

  Value* ids_of_rows(Value* ids) { return is_needed_ ? call("ids_of_rows", {ids}, {first(), channels()}) : ids; }
  Value* index_of_result(Value* result, Value* ids, Value* active) {
    return call("index_of_result", {result, ids, active}, {first(), channels()});
  }
  Value* repeated_ids(Value* ids, Value* active, Value* index) {
    return call("repeated_ids", {ids, active, index}, {});
  }
  Value* repeated_mask(Value* mask, Value* index) { return call("repeated_mask", {mask, index}, {}); }
  Value* heads_of_channels(Value* ids, Value* head_ids) {
    c10::List<c10::List<int64_t>> heads;
    for (const NamedComposition& composition : compositions_) {
      c10::List<int64_t> own;
      for (const std::string& name : channel_heads(composition.tree)) {
        own.push_back(find_id(adapters_, name, "compose"));
      }
      heads.push_back(own);
    }
    return call("heads_of_channels", {ids, head_ids}, {first(), channels(), heads});
  }

 private:
  c10::IValue first() const { return static_cast<int64_t>(adapter_names(adapters_).size()); }
  c10::IValue channels() const { return channels_of(compositions_); }

  Value* call(const char* function, std::vector<Value*> arguments, const std::vector<c10::IValue>& constants) {
    for (const c10::IValue& constant : constants) {
      arguments.push_back(graph_.insertConstant(constant));
    }
    return torch::jit::insertGraph(graph_, *compile_graph(kParallelRows, function), arguments)[0];
  }

  Graph& graph_;
  const Module adapters_;
  std::vector<NamedComposition> compositions_;
  bool is_needed_ = false;
};

struct GraftedCall {
  Value* result = nullptr;
  Value* gates = nullptr;
};

GraftedCall insert_grafted_call(Graph& graph, const Module& module) {
  Value* pair = insert_whole_graph_call(graph, module, kGrafted, graph.inputs());
  Node* unpack = graph.insertNode(graph.createTupleUnpack(pair));
  return {unpack->outputs()[0], unpack->outputs()[1]};
}

void add_forward(Module& module, const FunctionSchema& schema) {
  const auto arguments = with_adapter_ids(schema);
  const auto graph = graph_for(module, arguments);
  WithInsertPoint guard(graph->return_node());
  Value* adapters = graph->insertGetAttr(graph->inputs()[0], "adapters");
  Value* active = graph->insertGetAttr(adapters, "active");
  Value* inactive = graph->insert(c10::aten::lt, {active, 0});
  Value* no_ids = graph->insert(c10::aten::__is__, {graph->inputs().back(), graph->insertConstant(c10::IValue())});
  Value* use_base = graph->insert(c10::aten::__and__, {inactive, no_ids});
  Node* branch = graph->insertNode(graph->create(c10::prim::If, {use_base}, 1));
  const c10::TypePtr result_type = schema.returns()[0].type();
  {
    WithInsertPoint inner(branch->addBlock());
    const auto base_inputs = graph->inputs().slice(0, graph->inputs().size() - 1);
    branch->blocks()[0]->registerOutput(insert_whole_graph_call(*graph, module, kBaseForward, base_inputs));
  }
  {
    WithInsertPoint inner(branch->addBlock());
    branch->blocks()[1]->registerOutput(insert_grafted_call(*graph, module).result);
  }
  graph->registerOutput(branch->output()->setType(result_type));
  add_method(module, "forward", graph, arguments, schema.returns());
}

void add_forward_with_gates(Module& module, const FunctionSchema& schema) {
  const auto arguments = with_adapter_ids(schema);
  const auto graph = graph_for(module, arguments);
  WithInsertPoint guard(graph->return_node());
  const GraftedCall call = insert_grafted_call(*graph, module);
  Value* adapters = graph->insertGetAttr(graph->inputs()[0], "adapters");
  const Function& collect = module.attr("adapters").toModule().type()->getMethod("collect_gates");
  const c10::TypePtr gates_type = collect.getSchema().returns()[0].type();
  Value* ids = ParallelRows(*graph, module.attr("adapters").toModule()).ids_of_rows(graph->inputs().back());
  Value* gates = insert_method_call(*graph, collect, {adapters, call.gates, ids}, gates_type);
  Value* pair = graph->insertNode(graph->createTuple({call.result, gates}))->output();
  graph->registerOutput(pair);
  add_method(module, "forward_with_gates", graph, arguments, {Argument("", pair->type())});
}

// The hidden states in the result of forward.
Value* hidden_states(Graph& graph, Value* result) {
  if (result->type()->cast<c10::TupleType>()) {
    Node* unpack = graph.insertNode(graph.createTupleUnpack(result));
    const auto outputs = unpack->outputs();
    const auto first = std::find_if(outputs.begin(), outputs.end(), [](Value* output) { return is_tensor(output); });
    TORCH_CHECK(first != outputs.end(), "add_head: the module's forward returns a tuple without a Tensor");
    return *first;
  }
  if (result->type()->cast<c10::DictType>()) {
    return graph.insert(c10::aten::__getitem__, {result, "last_hidden_state"});
  }
  TORCH_CHECK(is_tensor(result), "add_head: the module's forward returns ", result->type()->repr_str(),
              "; a head needs a Tensor, a tuple with one, or a dict with \"last_hidden_state\"");
  return result;
}

void add_forward_with_head(Module& module, const FunctionSchema& schema, const HeadInputs& inputs) {
  const auto arguments = with_adapter_ids(schema);
  const auto graph = graph_for(module, arguments);
  WithInsertPoint guard(graph->return_node());
  Value* hidden = hidden_states(*graph, insert_grafted_call(*graph, module).result);
  hidden = inputs.sequence_first ? graph->insert(c10::aten::transpose, {hidden, 0, 1}) : hidden;
  Value* mask = nullptr;
  for (size_t i = 1; i < arguments.size(); ++i) {
    mask = arguments[i].name() == inputs.token_mask ? graph->inputs()[i] : mask;
  }
  mask = mask ? mask : graph->insertConstant(c10::IValue());
  Value* adapters = graph->insertGetAttr(graph->inputs()[0], "adapters");
  Value* ids = graph->inputs().back();
  Value* active = graph->insertGetAttr(adapters, "active");
  if (module.attr("adapters").toModule().hasattr("composed_heads")) {
    ParallelRows parallel(*graph, module.attr("adapters").toModule());
    if (parallel) {
      Value* index = parallel.index_of_result(hidden, ids, active);
      ids = parallel.repeated_ids(ids, active, index);
      mask = parallel.repeated_mask(mask, index);
    }
    Value* heads = graph->insertGetAttr(adapters, "composed_heads");
    active = torch::jit::insertGraph(*graph, *compile_graph(kHeadsOfCompositions, "head_id"), {active, ids, heads})[0];
    Value* of_rows = torch::jit::insertGraph(*graph, *compile_graph(kHeadsOfCompositions, "head_ids"), {ids, heads})[0];
    ids = parallel ? parallel.heads_of_channels(ids, of_rows) : of_rows;
  }
  const Function& logits = module.attr("adapters").toModule().attr("heads").toModule().type()->getMethod("logits");
  Value* result = insert_method_call(
      *graph, logits, {graph->insertGetAttr(adapters, "heads"), hidden, mask, ids, active}, c10::TensorType::get());
  graph->registerOutput(result);
  add_method(module, kWithHead, graph, arguments, {Argument("", result->type())});
}

// Adds adapter_ids=None to the calls of `self.forward` in the module's other methods, or removes that argument.
void change_callers(const Module& module, bool add_argument) {
  for (Function* method : module.type()->methods()) {
    auto* function = torch::jit::tryToGraphFunction(*method);
    const std::string& name = method->name();
    if (!function || name == kBaseForward || name == kGrafted || name == "forward" || name == "forward_with_gates" ||
        name == kWithHead || name == kOriginalForward) {
      continue;
    }
    for_each_node(function->graph()->block(), [&](Node* node) {
      const bool calls_forward = node->kind() == c10::prim::CallMethod && node->s(c10::attr::name) == "forward" &&
                                 node->input(0)->type() == module.type();
      if (!calls_forward) {
        return;
      }
      if (add_argument) {
        WithInsertPoint guard(node);
        node->addInput(node->owningGraph()->insertConstant(c10::IValue()));
      } else {
        node->removeInput(node->inputs().size() - 1);
      }
    });
  }
}

}  // namespace

std::string name_remedy(const std::string& name) {
  return "; give the base's another name in the result: rename={'" + name + "': 'base_" + name +
         "'} (torchgraft add --rename " + name + "=base_" + name + "; C++: GraftOptions::rename)";
}

bool is_grafted(const Module& module) { return module.hasattr("adapters") && module.find_method(kGrafted).has_value(); }

void check_grafted(const Module& module, const char* what) {
  if (is_grafted(module)) {
    return;
  }
  for (const auto& [path, submodule] : module.named_modules()) {
    TORCH_CHECK(!is_grafted(submodule), what, ": the module has no adapters, but its submodule ", path,
                " has; pass the submodule");
  }
  TORCH_CHECK(false, what, ": the module has no adapters; graft some first");
}

std::string active_name(const Module& grafted) {
  const c10::IValue active = grafted.get_method("active_adapter")({});
  return active.isNone() ? "" : active.toStringRef();
}

WhileActive::WhileActive(Module grafted, const std::string& name) : grafted_(std::move(grafted)) {
  if (name.empty()) {
    return;
  }
  before_ = active_name(grafted_);
  grafted_.get_method("activate")({name});
}

WhileActive::~WhileActive() {
  if (before_ && before_->empty()) {
    grafted_.get_method("deactivate")({});
  } else if (before_) {
    grafted_.get_method("activate")({*before_});
  }
}

void add_methods(Module& module, const std::shared_ptr<Graph>& grafted_graph, const HeadInputs& heads) {
  const Function& forward = module.get_method("forward").function();
  const FunctionSchema schema = forward.getSchema();
  const auto base_graph = torch::jit::toGraphFunction(const_cast<Function&>(forward)).graph();
  std::vector<std::string> names = kAddedMethods;
  names.insert(names.end(), {kWithHead, kWholeGraphs});
  for (const std::string& name : names) {
    const bool is_attribute = module.hasattr(name);
    TORCH_CHECK(name == "forward" || !(is_attribute || module.find_method(name)), "graft: the module already has ",
                is_attribute ? "an attribute '" : "a method '", name, "', which grafting adds", name_remedy(name));
  }
  remove_method(module, "forward");
  if (calls_methods(*base_graph)) {
    add_method(module, kOriginalForward, base_graph->copy(), schema.arguments(), schema.returns());
  }
  add_whole_graphs(module);
  add_whole_graph(module, kBaseForward, base_graph, schema.arguments(), schema.returns());
  const c10::TypePtr pair_type = grafted_graph->outputs()[0]->type();
  add_whole_graph(module, kGrafted, grafted_graph, with_adapter_ids(schema), {Argument("", pair_type)});
  add_forward(module, schema);
  add_forward_with_gates(module, schema);
  if (module.attr("adapters").toModule().hasattr("heads")) {
    add_forward_with_head(module, schema, heads);
  }
  module.define(kDelegates);
  change_callers(module, /*add_argument=*/true);
}

void forget_original_forward(Module& module) {
  if (module.find_method(kOriginalForward)) {
    remove_method(module, kOriginalForward);
  }
}

void remove_methods(Module& module) {
  const Function& base = module.get_method(kBaseForward).function();
  const FunctionSchema schema = base.getSchema();
  const auto original = module.find_method(kOriginalForward);
  const auto graph = original ? original->graph()->copy() : whole_graph(module, kBaseForward);
  change_callers(module, /*add_argument=*/false);
  std::vector<std::string> added = kAddedMethods;
  added.emplace_back(kWithHead);
  for (const std::string& name : added) {
    if (module.find_method(name)) {
      remove_method(module, name);
    }
  }
  remove_whole_graphs(module);
  add_method(module, "forward", graph, schema.arguments(), schema.returns());
  module._ivalue()->unsafeRemoveAttr("adapters");
  module.type()->unsafeRemoveAttribute("adapters");
}

}  // namespace torchgraft
