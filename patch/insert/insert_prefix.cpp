#include <torchgraft/patch/insert/insert_prefix.h>

#include <torchgraft/patch/graph/linear_map.h>

namespace torchgraft {

using torch::jit::NamedValue;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

Node* insert_prefix(Inserter& inserter, const Slot& slot) {
  Node* attention = inserter.layer_sites().attention;
  WithInsertPoint guard(attention);
  const LinearSite& query = inserter.layer_sites().query;
  Value* x = inserter.swapped(linear_input(query.node), query.sequence_first);
  Value* module = inserter.slot_module(slot);
  std::vector<NamedValue> named = inserter.common_arguments(slot, module);
  named.emplace_back("scale", attention->namedInput("scale"));
  named.emplace_back("enable_gqa", attention->namedInput("enable_gqa"));
  Node* op = inserter.call(
      "gated_prefix_attention",
      {NamedValue(attention->namedInput("query")), NamedValue(attention->namedInput("key")),
       NamedValue(attention->namedInput("value")), NamedValue(x),
       NamedValue(inserter.parameter(slot, module, "prefix_key")),
       NamedValue(inserter.parameter(slot, module, "prefix_value")),
       NamedValue(inserter.parameter(slot, module, "prefix_length")), NamedValue(attention->namedInput("attn_mask")),
       NamedValue(attention->namedInput("dropout_p")), NamedValue(attention->namedInput("is_causal"))},
      named);
  attention->output()->replaceAllUsesWith(op->outputs()[0]);
  return op;
}

}  // namespace torchgraft
