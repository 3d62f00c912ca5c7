#pragma once

#include "support.h"

#include <torchgraft/patch/graph/module_methods.h>

#include <ATen/core/dispatch/Dispatcher.h>

// For tests of quantised linear maps.
namespace torchgraft::testing {

constexpr const char* kPackedClass = "__torch__.torch.classes.quantized.LinearPackedParamsBase";

// `weight` [out, in] in int8, one scale for each row, in an object as quantized::linear_dynamic reads it.
inline c10::IValue packed_int8(const at::Tensor& weight) {
  const at::Tensor scales = weight.abs().amax({1}).to(at::kDouble) / 127.5;
  const at::Tensor points = at::zeros({weight.size(0)}, at::kLong);
  torch::jit::Stack stack = {at::quantize_per_channel(weight, scales, points, 0, at::kQInt8), c10::IValue()};
  c10::Dispatcher::singleton().findSchemaOrThrow("quantized::linear_prepack", "").callBoxed(stack);
  return stack.front();
}

// A module with `packed` as its attribute "packed", whose forward(x) is op(x, packed, reduce_range=True).
inline torch::jit::Module make_packed_module(const c10::IValue& packed, const std::string& op) {
  torch::jit::Module module("TestModule");
  module.register_attribute("training", c10::BoolType::get(), false);
  module.register_attribute("packed", packed.type(), packed);
  const auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::Value* self = graph->addInput("self")->setType(module.type());
  torch::jit::Value* x = graph->addInput("x");
  torch::jit::Value* weight = graph->insertGetAttr(self, "packed");
  torch::jit::Value* reduce_range = graph->insertConstant(true);
  const auto kind = c10::Symbol::fromQualString(op);
  graph->registerOutput(graph->insertNode(graph->create(kind, {x, weight, reduce_range}))->output());
  const std::vector<c10::Argument> arguments = {c10::Argument("self", module.type()), c10::Argument("x")};
  add_method(module, "forward", graph, arguments, {c10::Argument("")});
  return module;
}

}  // namespace torchgraft::testing
