#include <torchgraft/patch/forward_inputs.h>

#include <ATen/ATen.h>

namespace torchgraft {
namespace {

constexpr const char* kWrapRemedy = "wrap the model in a module whose forward is forward(input_ids, attention_mask)";

bool takes_tensor(const c10::Argument& argument) {
  return argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor());
}

bool name_contains(const std::string& name, const char* part) { return name.find(part) != std::string::npos; }

}  // namespace

ForwardInputs::ForwardInputs(const torch::jit::Module& module, const std::string& method)
    : ForwardInputs(module.get_method(method).function().getSchema()) {}

ForwardInputs::ForwardInputs(const c10::FunctionSchema& schema) {
  const std::vector<c10::Argument>& arguments = schema.arguments();
  size_t given = 0;  // how many arguments there are up to the last that a text gives
  for (size_t i = 1; i < arguments.size(); ++i) {
    const Kind kind = kind_of(arguments[i]);
    if (kind == Kind::kDefault) {
      const auto& default_value = arguments[i].default_value();
      TORCH_CHECK(default_value, "forward's argument '", arguments[i].name(),
                  "' is none that a text gives (token ids, a mask, token types) and has no default; ", kWrapRemedy);
      inputs_.push_back({kind, *default_value});
      continue;
    }
    inputs_.push_back({kind, {}});
    given = inputs_.size();
    takes_mask_ = takes_mask_ || kind == Kind::kMask;
    ids_position_ = kind == Kind::kIds ? i : ids_position_;
  }
  TORCH_CHECK(ids_position_ > 0, "forward takes no token ids; ", kWrapRemedy);
  inputs_.resize(given);
}

ForwardInputs::Kind ForwardInputs::kind_of(const c10::Argument& argument) const {
  if (!takes_tensor(argument) || argument.name() == "adapter_ids") {
    return Kind::kDefault;
  }
  if (name_contains(argument.name(), "mask")) {
    return Kind::kMask;
  }
  if (name_contains(argument.name(), "type")) {
    return Kind::kTypes;
  }
  return ids_position_ == 0 ? Kind::kIds : Kind::kDefault;
}

std::vector<c10::IValue> ForwardInputs::arguments(const TokenTensors& tokens) const {
  TORCH_CHECK(tokens.ids.defined(), "ForwardInputs: expected token ids, got an undefined tensor");
  TORCH_CHECK(tokens.mask.defined() || !takes_mask_, "ForwardInputs: forward takes a mask, none was given");
  std::vector<c10::IValue> result;
  for (const Input& input : inputs_) {
    switch (input.kind) {
      case Kind::kIds:
        result.emplace_back(tokens.ids);
        break;
      case Kind::kMask:
        result.emplace_back(tokens.mask);
        break;
      case Kind::kTypes:
        result.emplace_back(tokens.types.defined() ? tokens.types : at::zeros_like(tokens.ids));
        break;
      case Kind::kDefault:
        result.push_back(input.default_value);
        break;
    }
  }
  return result;
}

}  // namespace torchgraft
