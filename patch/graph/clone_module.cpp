#include <torchgraft/patch/graph/clone_module.h>

#include <unordered_map>
#include <unordered_set>

namespace torchgraft {
namespace {

using torch::jit::Module;

class Cloner {
 public:
  // Gives `object` attribute values of its own. Before, it shares those of the original.
  void separate(const c10::intrusive_ptr<c10::ivalue::Object>& object) {
    if (!visited_.insert(object.get()).second) {
      return;
    }
    const c10::ClassType& type = *object->type();
    for (size_t slot = 0; slot < type.numAttributes(); ++slot) {
      const c10::IValue& value = object->getSlot(slot);
      if (type.getAttribute(slot)->is_module()) {
        separate(value.toObject());
      } else if (type.is_parameter(slot) && value.isTensor()) {
        object->setSlot(slot, alias(value.toTensor()));
      } else {
        object->setSlot(slot, value.deepcopy(copies_));
      }
    }
  }

 private:
  // A leaf tensor on the memory of `tensor`.
  at::Tensor alias(const at::Tensor& tensor) {
    at::Tensor& result = aliases_[tensor.unsafeGetTensorImpl()];
    if (!result.defined() && tensor.defined()) {
      result = tensor.variable_data().set_requires_grad(tensor.requires_grad());
    }
    return result;
  }

  std::unordered_set<const c10::ivalue::Object*> visited_;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> aliases_;
  c10::IValue::HashIdentityIValueMap copies_;
};

}  // namespace

Module clone_module(const Module& module) {
  Module result = module.clone(/*inplace=*/true);
  Cloner().separate(result._ivalue());
  return result;
}

}  // namespace torchgraft
