#include <torchgraft/patch/graph/clone_module.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <torch/csrc/jit/api/function_impl.h>

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

namespace torchgraft {
namespace {

using c10::ClassType;
using c10::ClassTypePtr;
using c10::TypePtr;
using torch::jit::CompilationUnit;
using torch::jit::Function;
using torch::jit::Graph;
using torch::jit::Module;
using ObjectPtr = c10::intrusive_ptr<c10::ivalue::Object>;
using UnitPtr = std::shared_ptr<CompilationUnit>;

// Frees a clone's unit. The units of other modules whose functions and classes the clone's methods name live as long.
struct UnitDeleter {
  std::vector<UnitPtr> named;

  void operator()(CompilationUnit* unit) const { delete unit; }
};

void add_unit(std::vector<UnitPtr>& units, const UnitPtr& unit) {
  if (std::find(units.begin(), units.end(), unit) == units.end()) {
    units.push_back(unit);
  }
}

// The units that a clone of `root` must keep. Of a unit that is a clone's own, the clone's methods name nothing: all
// that it owns are module types, and those are copied. So a chain of clones keeps the first module's unit only.
void collect_units(const Module& root, std::vector<UnitPtr>& units) {
  for (const Module& module : root.modules()) {
    const UnitPtr unit = module._ivalue()->compilation_unit();
    if (const auto* deleter = std::get_deleter<UnitDeleter>(unit)) {
      for (const UnitPtr& named : deleter->named) {
        add_unit(units, named);
      }
    } else {
      add_unit(units, unit);
    }
  }
}

// Inlined nodes point to the functions that they came from, which go with the unit of another module, and which
// freezing removes. The interpreter looks there when a node throws. So copies point to a function that always is.
torch::jit::InlinedCallStackPtr lasting_call_stack(const torch::jit::Node* node) {
  static Function* const kInlined = (new CompilationUnit())->create_function("inlined", std::make_shared<Graph>());
  return c10::make_intrusive<torch::jit::InlinedCallStack>(kInlined, node->sourceRange());
}

void let_call_stacks_last(Graph& graph) {
  for_each_node(graph.block(), [](torch::jit::Node* node) {
    if (node->callstack()) {
      node->setCallStack(lasting_call_stack(node));
    }
    if (node->hasAttribute(c10::attr::Subgraph)) {  // what prim::fork runs
      let_call_stacks_last(*node->g(c10::attr::Subgraph));
    }
  });
}

class Cloner {
 public:
  explicit Cloner(UnitPtr unit) : unit_(std::move(unit)) {}

  Module clone(const Module& module) {
    const ObjectPtr result = copy(module._ivalue());
    // All types have their copies now, so that methods can name them.
    for (const auto& [original, type] : copied_types_) {
      copy_methods(*original, *type);
    }
    return Module(result);
  }

 private:
  ObjectPtr copy(const ObjectPtr& original) {
    if (const auto found = objects_.find(original.get()); found != objects_.end()) {
      return found->second;
    }
    const ClassTypePtr from = original->type();
    const bool is_new = !types_.count(from);
    const ClassTypePtr type = is_new ? new_type(from) : types_.at(from)->expect<ClassType>();
    const ObjectPtr result = c10::ivalue::Object::create(c10::StrongTypePtr(unit_, type), from->numAttributes());
    objects_[original.get()] = result;
    for (size_t slot = 0; slot < from->numAttributes(); ++slot) {
      const c10::IValue& value = original->getSlot(slot);
      TypePtr attribute = from->getAttribute(slot);
      if (attribute->is_module()) {
        const ObjectPtr child = copy(value.toObject());
        // An attribute typed by an interface keeps that type, which is a list of schemas.
        attribute = attribute->cast<ClassType>() ? TypePtr(child->type()) : attribute;
        result->setSlot(slot, child);
      } else if (from->is_parameter(slot) && value.isTensor()) {
        result->setSlot(slot, alias(value.toTensor()));
      } else if (is_packed_object(value)) {
        result->setSlot(slot, value);
      } else {
        result->setSlot(slot, value.deepcopy(values_));
      }
      if (is_new) {
        type->addAttribute(from->getAttributeName(slot), attribute, from->is_parameter(slot), from->is_buffer(slot));
      }
    }
    return result;
  }

  ClassTypePtr new_type(const ClassTypePtr& from) {
    c10::QualifiedName name = *from->name();
    if (unit_->get_class(name)) {
      name = unit_->mangle(name);
    }
    const ClassTypePtr type = ClassType::create(name, unit_, /*is_module=*/true);
    unit_->register_type(type);
    for (size_t i = 0; i < from->numConstants(); ++i) {
      type->addConstant(from->getConstantName(i), from->getConstant(i));
    }
    types_[from] = type;
    copied_types_.emplace_back(from, type);
    return type;
  }

  void copy_methods(const ClassType& from, ClassType& type) {
    const auto remap = [&](TypePtr original) {
      const auto found = types_.find(original);
      return found == types_.end() ? original : found->second;
    };
    for (Function* method : from.methods()) {
      method->ensure_defined();
      const auto graph = torch::jit::toGraphFunction(*method).graph()->copy();
      graph->remapTypes(remap);
      let_call_stacks_last(*graph);
      Function* function = unit_->create_function(c10::QualifiedName(*type.name(), method->name()), graph);
      type.addMethod(function);
      function->setSchema(method->getSchema().cloneWithRemappedTypes(remap));
    }
  }

  // A leaf tensor on the memory of `tensor`. Tied parameters stay tied.
  at::Tensor alias(const at::Tensor& tensor) {
    at::Tensor& result = aliases_[tensor.unsafeGetTensorImpl()];
    if (!result.defined() && tensor.defined()) {
      result = tensor.variable_data().set_requires_grad(tensor.requires_grad());
    }
    return result;
  }

  UnitPtr unit_;
  std::unordered_map<const c10::ivalue::Object*, ObjectPtr> objects_;
  std::unordered_map<TypePtr, TypePtr> types_;
  std::vector<std::pair<ClassTypePtr, ClassTypePtr>> copied_types_;  // in the order of their first objects
  std::unordered_map<const c10::TensorImpl*, at::Tensor> aliases_;
  c10::IValue::HashIdentityIValueMap values_;
};

}  // namespace

Module clone_module(const Module& module) {
  UnitDeleter deleter;
  collect_units(module, deleter.named);
  return Cloner(UnitPtr(new CompilationUnit(), std::move(deleter))).clone(module);
}

void check_no_hooks(const Module& module, const char* what) {
  for (const auto& [path, submodule] : module.named_modules()) {
    const ClassType& type = *submodule.type();
    TORCH_CHECK(type.getForwardHooks().empty() && type.getForwardPreHooks().empty(), what, ": ",
                path.empty() ? "the module" : "the submodule " + path,
                " has forward hooks, which the result cannot keep; call in its forward what they do");
  }
}

}  // namespace torchgraft
