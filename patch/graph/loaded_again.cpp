#include <torchgraft/patch/graph/loaded_again.h>

#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/no_warnings.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/serialization/import.h>

#include <sstream>
#include <unordered_map>

namespace torchgraft {
namespace {

using torch::jit::Module;

using Objects = std::unordered_map<const c10::ivalue::Object*, c10::intrusive_ptr<c10::ivalue::Object>>;

// Packed weights of one element, which nothing runs.
c10::IValue small_packed_linear() {
  const at::Tensor weight = at::quantize_per_tensor(at::zeros({1, 1}), /*scale=*/1.0, /*zero_point=*/0, at::kQInt8);
  torch::jit::Stack stack = {weight, c10::IValue()};
  c10::Dispatcher::singleton().findSchemaOrThrow("quantized::linear_prepack", "").callBoxed(stack);
  return stack.front();
}

// Whether all indices of a tensor can share one element. Sparse, quantised and nested tensors have no strides of their
// own, and stay whole.
bool can_be_hollow(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested();
}

// Copies an object tree with tensors of the same shapes, in which all indices share one element.
c10::intrusive_ptr<c10::ivalue::Object> hollow(const c10::ivalue::Object& object, Objects& done) {
  if (const auto found = done.find(&object); found != done.end()) {
    return found->second;
  }
  const auto copy = c10::ivalue::Object::create(object.type(), object.slots().size());
  done[&object] = copy;
  for (size_t i = 0; i < object.slots().size(); ++i) {
    const c10::IValue& slot = object.getSlot(i);
    if (slot.isTensor() && can_be_hollow(slot.toTensor())) {
      const at::Tensor& tensor = slot.toTensor();
      copy->setSlot(i, at::zeros({}, tensor.options().requires_grad(false)).expand(tensor.sizes()));
    } else if (slot.isObject() && slot.toObjectRef().type()->is_module()) {
      copy->setSlot(i, hollow(slot.toObjectRef(), done));
    } else if (is_packed_linear_weight(slot)) {
      copy->setSlot(i, small_packed_linear());
    } else {
      copy->setSlot(i, slot);
    }
  }
  return copy;
}

}  // namespace

Module loaded_again(const Module& module, const char* what) {
  const NoWarnings no_warnings;
  try {
    Objects done;
    const Module light(hollow(*module._ivalue(), done));
    std::stringstream file;
    light.save(file);
    return torch::jit::load(file, c10::kCPU);
  } catch (const std::exception& error) {
    TORCH_CHECK(false, what, ": the module that was made cannot be loaded from a file: ", one_line(error),
                ". Nothing was changed; please report the model");
  }
}

}  // namespace torchgraft
