#include <torchgraft/patch/insert/guard_attributes.h>

#include <ATen/core/List.h>
#include <ATen/core/interned_strings.h>
#include <torch/csrc/jit/ir/constants.h>

#include <cmath>
#include <map>
#include <sstream>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr const char* kError =
    "forward: {} when the adapters were grafted, or the module optimised, and the graph keeps that; set it before, on "
    "the base";

std::string value_of(const ModuleAttribute& attribute) {
  std::ostringstream value;
  value << attribute.value;
  return "'" + attribute.path + "' was " + value.str();
}

// Collects answers, and checks that all are true. One check of all, for TorchScript compiles a module from its file in
// a time that grows with its branches.
class Guard {
 public:
  explicit Guard(Graph& graph) : graph_(graph) {}

  // Reads "encoder.scale" from the graph's self.
  Value* read(const std::string& path) {
    Value*& value = read_[path];
    if (!value) {
      const size_t dot = path.rfind('.');
      Value* owner = dot == std::string::npos ? graph_.inputs()[0] : read(path.substr(0, dot));
      value = graph_.insertGetAttr(owner, path.substr(dot + 1));  // npos + 1 is 0
    }
    return value;
  }

  void expect(Value* answer, const ModuleAttribute& attribute) {
    answers_.push_back(answer);
    described_.push_back(value_of(attribute));
  }

  // Throws for the first answer that is false.
  void check() {
    if (answers_.empty()) {
      return;
    }
    Value* answers = graph_.insertNode(graph_.createList(c10::BoolType::get(), answers_))->output();
    Value* all = graph_.insert(c10::aten::all, {answers});
    Node* branch = graph_.insertNode(graph_.create(c10::prim::If, {all}, /*num_outputs=*/0));
    branch->addBlock();
    const torch::jit::WithInsertPoint otherwise(branch->addBlock());
    Value* first = graph_.insert(c10::aten::index, {answers, false});
    Value* which = graph_.insert(c10::aten::__getitem__, {graph_.insertConstant(described_), first});
    graph_.insert(c10::prim::RaiseException, {graph_.insert(c10::aten::format, {std::string(kError), which})});
  }

 private:
  Graph& graph_;
  std::map<std::string, Value*> read_;
  std::vector<Value*> answers_;
  c10::List<std::string> described_;
};

}  // namespace

void guard_attributes(const std::shared_ptr<Graph>& graph, const std::vector<ModuleAttribute>& folded) {
  const torch::jit::WithInsertPoint begin(*graph->nodes().begin());
  Guard is_there(*graph);
  std::vector<std::pair<Value*, const ModuleAttribute*>> optional;
  Guard is_same(*graph);
  for (const ModuleAttribute& attribute : folded) {
    if (attribute.value.isDouble() && std::isnan(attribute.value.toDouble())) {
      continue;  // equal to nothing
    }
    Value* current = is_there.read(attribute.path);
    if (current->type()->kind() == c10::TypeKind::NoneType) {
      continue;  // can be nothing else
    }
    if (attribute.value.isNone()) {
      Value* none = graph->insertConstant(c10::IValue());
      is_there.expect(graph->insert(c10::aten::__is__, {current, none}), attribute);
    } else if (current->type()->kind() == c10::TypeKind::OptionalType) {
      Value* none = graph->insertConstant(c10::IValue());
      is_there.expect(graph->insert(c10::aten::__isnot__, {current, none}), attribute);
      optional.emplace_back(current, &attribute);
    } else {
      is_same.expect(graph->insert(c10::aten::eq, {current, graph->insertConstant(attribute.value)}), attribute);
    }
  }
  is_there.check();
  for (const auto& [value, attribute] : optional) {
    Value* current = graph->insert(c10::prim::unchecked_unwrap_optional, {value});
    is_same.expect(graph->insert(c10::aten::eq, {current, graph->insertConstant(attribute->value)}), *attribute);
  }
  is_same.check();
}

}  // namespace torchgraft
