#include <torchgraft/patch/insert/join_parts.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// Columns [begin, end) of the projection's result, as an adapter has made them.
struct Part {
  int64_t begin;
  int64_t end;
  Value* value;
};

// In the order of their columns; empty when they do not follow each other or overlap.
std::vector<Part> parts_in_order(const PackedParts& packed) {
  static const auto kGatedLora = c10::Symbol::fromQualString("torchgraft::gated_lora");
  std::vector<Part> result;
  const Value* whole = packed.writes.front()->namedInput("self");
  for (Node* write : packed.writes) {
    const auto begin = constant_int(write->namedInput("start"));
    const auto end = constant_int(write->namedInput("end"));
    Value* value = write->namedInput("src");
    if (write->namedInput("self") != whole || !begin || !end || value->node()->kind() != kGatedLora) {
      return {};
    }
    result.push_back({*begin, *end, value});
    whole = write->output();
  }
  std::sort(result.begin(), result.end(), [](const Part& a, const Part& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t next = i + 1 < result.size() ? result[i + 1].begin : packed.columns;
    if (result[i].end > next) {
      return {};
    }
  }
  return result;
}

// Whether nothing but the next write and the other LoRAs' reads sees a result with some of the changes.
bool are_alone(const PackedParts& packed) {
  for (size_t i = 0; i + 1 < packed.writes.size(); ++i) {
    for (const torch::jit::Use& use : packed.writes[i]->output()->uses()) {
      const bool is_read = std::find(packed.reads.begin(), packed.reads.end(), use.user) != packed.reads.end();
      if (use.offset != 0 || (use.user != packed.writes[i + 1] && !is_read)) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

void join_parts(Graph& graph, const PackedParts& packed) {
  if (packed.columns == 0 || packed.writes.empty() || !are_alone(packed)) {
    return;
  }
  const std::vector<Part> parts = parts_in_order(packed);
  if (parts.empty()) {
    return;
  }
  Value* whole = packed.writes.front()->namedInput("self");
  for (Node* read : packed.reads) {
    read->replaceInput(0, whole);  // columns that no other write changes
  }
  Node* last = packed.writes.back();
  torch::jit::WithInsertPoint guard(last);
  std::vector<Value*> pieces;
  const auto keep = [&](int64_t begin, int64_t end) {
    if (begin < end) {
      pieces.push_back(graph.insert(c10::aten::narrow, {whole, -1, begin, end - begin}));
    }
  };
  int64_t begin = 0;
  for (const Part& part : parts) {
    keep(begin, part.begin);
    pieces.push_back(part.value);
    begin = part.end;
  }
  keep(begin, packed.columns);
  Value* list = graph.insertNode(graph.createList(c10::TensorType::get(), pieces))->output();
  last->output()->replaceAllUsesWith(graph.insert(c10::aten::cat, {list, -1}));
  for (auto write = packed.writes.rbegin(); write != packed.writes.rend(); ++write) {
    (*write)->destroy();
  }
}

}  // namespace torchgraft
