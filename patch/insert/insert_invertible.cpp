#include <torchgraft/patch/insert/insert_invertible.h>

#include <torchgraft/patch/graph/activation_source.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/insert/row_functions.h>

#include <vector>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

namespace {

// As NICECouplingBlock of the adapters library: x = [x1, x2], y1 = x1 + F(x2), y2 = x2 + G(y1).
std::string nice_source(const std::string& non_linearity) {
  return row_source() + R"python(
def subnet(x: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
           adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    inner = torch.matmul(x, selected(down_weight, adapter_ids, adapter).transpose(1, 2)) + \
        selected(down_bias, adapter_ids, adapter).unsqueeze(1)
    hidden = )python" +
         activation_source(non_linearity) + R"python(
    return torch.matmul(hidden, selected(up_weight, adapter_ids, adapter).transpose(1, 2)) + \
        selected(up_bias, adapter_ids, adapter).unsqueeze(1)

def nice(x: Tensor, f_down_weight: Tensor, f_down_bias: Tensor, f_up_weight: Tensor, f_up_bias: Tensor,
         g_down_weight: Tensor, g_down_bias: Tensor, g_up_weight: Tensor, g_up_bias: Tensor,
         adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    half = x.size(-1) // 2
    x1 = x.narrow(-1, 0, half)
    x2 = x.narrow(-1, half, x.size(-1) - half)
    y1 = x1 + subnet(x2, f_down_weight, f_down_bias, f_up_weight, f_up_bias, adapter_ids, adapter)
    y2 = x2 + subnet(y1, g_down_weight, g_down_bias, g_up_weight, g_up_bias, adapter_ids, adapter)
    return torch.cat([y1, y2], -1)

def nice_inverse(x: Tensor, f_down_weight: Tensor, f_down_bias: Tensor, f_up_weight: Tensor, f_up_bias: Tensor,
                 g_down_weight: Tensor, g_down_bias: Tensor, g_up_weight: Tensor, g_up_bias: Tensor,
                 adapter_ids: Optional[Tensor], adapter: int) -> Tensor:
    half = x.size(-1) // 2
    x1 = x.narrow(-1, 0, half)
    x2 = x.narrow(-1, half, x.size(-1) - half)
    y2 = x2 - subnet(x1, g_down_weight, g_down_bias, g_up_weight, g_up_bias, adapter_ids, adapter)
    y1 = x1 - subnet(y2, f_down_weight, f_down_bias, f_up_weight, f_up_bias, adapter_ids, adapter)
    return torch.cat([y1, y2], -1)
)python";
}

// (changed x, gate); x is [B, S, E].
std::pair<Value*, Value*> changed(Inserter& inserter, const Slot& slot, Value* x, const char* function) {
  torch::jit::Graph& graph = inserter.graph();
  Value* module = inserter.slot_module(slot);
  RowFunctions rows(graph, inserter.adapter_ids(), inserter.active());
  Value* present = inserter.parameter(slot, module, "present");
  rows.check_ids("inv_adapter", x, present);
  std::vector<Value*> arguments = {x};
  for (const char* name : {"f_down_weight", "f_down_bias", "f_up_weight", "f_up_bias", "g_down_weight", "g_down_bias",
                           "g_up_weight", "g_up_bias"}) {
    arguments.push_back(inserter.parameter(slot, module, name));
  }
  arguments.push_back(inserter.adapter_ids());
  arguments.push_back(inserter.active());
  const auto body = compile_graph(nice_source(slot.form.non_linearity), function);
  Value* result = torch::jit::insertGraph(graph, *body, arguments)[0];
  Value* none = graph.insertConstant(c10::IValue());
  return {rows.choose(present, result, x), rows.pooled(x, none, none, none)};
}

// In the layout of the graph, dense: the model may view it.
Value* as_found(Inserter& inserter, Value* value, bool sequence_first) {
  Value* swapped = inserter.swapped(value, sequence_first);
  return sequence_first ? inserter.graph().insert(c10::aten::contiguous, {swapped}) : swapped;
}

}  // namespace

Value* insert_invertible(Inserter& inserter, const EmbeddingSite& site, const Slot& slot) {
  Node* maker = site.value->node();
  Node* end = inserter.marker_behind(maker->kind() == c10::prim::Param ? inserter.top() : maker);
  Value* gate = nullptr;
  {
    WithInsertPoint guard(end);
    const auto [result, ones] = changed(inserter, slot, inserter.swapped(site.value, site.sequence_first), "nice");
    gate = ones;
    Value* output = as_found(inserter, result, site.sequence_first);
    site.value->replaceAllUsesAfterNodeWith(end, output);
    if (inserter.present_stream(site.value) == site.value) {  // else the output of another slot follows this one
      inserter.replace_stream(site.value, output);
    }
  }
  end->destroy();
  if (slot.inverts_output) {
    WithInsertPoint guard(site.output);
    Value* x = linear_input(site.output);
    Value* inverse = changed(inserter, slot, inserter.swapped(x, site.output_is_sequence_first), "nice_inverse").first;
    site.output->replaceInputWith(x, as_found(inserter, inverse, site.output_is_sequence_first));
  }
  return gate;
}

}  // namespace torchgraft
