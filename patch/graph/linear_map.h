#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <optional>
#include <string>

// Linear maps: aten::linear, and those of quantised modules, whose weight is no tensor but an object that holds it
// packed. Of both, input 0 is what the map reads, and input 1 is the weight.
namespace torchgraft {

// A linear map of either kind: floating-point numbers in and out.
bool is_linear(const torch::jit::Node* node);

// quantized::linear_dynamic (int8) or quantized::linear_dynamic_fp16.
bool is_packed_linear(const torch::jit::Node* node);

// True for an op on quantised numbers, or on a packed weight, that no pass here understands: quantized::linear,
// onednn::qlinear_pointwise and the like.
bool is_unread_quantized(const torch::jit::Node* node);

torch::jit::Value* linear_input(const torch::jit::Node* linear);
torch::jit::Value* linear_weight(const torch::jit::Node* linear);

// A weight [rows, columns] in an object; a linear map's is [out, in].
struct PackedWeight {
  int64_t rows = 0;
  int64_t columns = 0;
  std::string dtype;  // "int8", "float16"
};

// nullopt when `value` is no object that holds a packed weight of a linear map or an embedding. Unpacks each object
// once, to learn its sizes.
std::optional<PackedWeight> packed_weight(const c10::IValue& value);

// Whether it is one of a linear map's.
bool is_packed_linear_weight(const c10::IValue& value);

// Whether `value` is an object that holds a packed weight of any kind. No operator changes one, so that copies of a
// module can share it.
bool is_packed_object(const c10::IValue& value);

}  // namespace torchgraft
