#include <torchgraft/patch/insert/insert_reft.h>

#include <torchgraft/patch/insert/row_functions.h>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

void insert_reft(Inserter& inserter, const Slot& slot) {
  Graph& graph = inserter.graph();
  const LayerEnd& layer_end = inserter.layer_sites().end.value();
  Value* mask = inserter.real_tokens();
  Value* stream = inserter.present_stream(layer_end.value);
  Node* end = inserter.marker_behind(stream->node());
  WithInsertPoint guard(end);
  Value* x = inserter.swapped(stream, layer_end.sequence_first);
  Value* module = inserter.slot_module(slot);
  const auto of = [&](const char* name) { return inserter.parameter(slot, module, name); };
  std::vector<NamedValue> named = {{"adapter_ids", inserter.adapter_ids()}, {"adapter", inserter.active()}};
  if (mask) {
    named.emplace_back("token_mask", mask);
  }
  Node* op = inserter.call("reft",
                           {NamedValue(x), NamedValue(of("source_weight")), NamedValue(of("source_bias")),
                            NamedValue(of("projection")), NamedValue(of("subtraction")), NamedValue(of("positions")),
                            NamedValue(graph.insertConstant(slot.non_linearity))},
                           named);
  Value* changed = op->output();
  if (slot.dropout > 0.0) {  // the library drops numbers of the changed tokens, not of the change
    RowFunctions rows(graph, inserter.adapter_ids(), inserter.active());
    changed = rows.at_positions(of("positions"), mask ? mask : graph.insertConstant(c10::IValue()),
                                inserter.dropped(slot, changed), changed);
  }
  Value* output = inserter.swapped(changed, layer_end.sequence_first);
  if (layer_end.sequence_first) {
    output = graph.insert(c10::aten::contiguous, {output});
  }
  stream->replaceAllUsesAfterNodeWith(end, output);
  end->destroy();
  inserter.replace_stream(layer_end.value, output);
}

}  // namespace torchgraft
