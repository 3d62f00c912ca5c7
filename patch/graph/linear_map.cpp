#include <torchgraft/patch/graph/linear_map.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <ATen/core/custom_class.h>
#include <ATen/native/quantized/PackedParams.h>
#include <ATen/native/quantized/cpu/EmbeddingPackedParams.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

constexpr const char* kLinearClass = "__torch__.torch.classes.quantized.LinearPackedParamsBase";
constexpr const char* kEmbeddingClass = "__torch__.torch.classes.quantized.EmbeddingPackedParamsBase";

std::string packed_class(const c10::IValue& value) {
  if (!value.isObject()) {
    return "";
  }
  const auto& name = value.toObjectRef().type()->name();
  const std::string text = name ? name->qualifiedName() : "";
  const bool is_packed = text.starts_with("__torch__.torch.classes.") && text.ends_with("PackedParamsBase");
  return is_packed ? text : "";
}

PackedWeight sizes_of(const at::Tensor& weight) {
  TORCH_INTERNAL_ASSERT(weight.dim() == 2, "a packed weight has ", weight.dim(), " dimensions");
  return {weight.size(0), weight.size(1), weight.is_quantized() ? "int8" : "float16"};
}

PackedWeight unpacked_sizes(const c10::IValue& value, const std::string& name) {
  if (name == kLinearClass) {
    return sizes_of(std::get<0>(value.toCustomClass<LinearPackedParamsBase>()->unpack()));
  }
  return sizes_of(value.toCustomClass<EmbeddingPackedParamsBase>()->unpack());
}

}  // namespace

bool is_packed_linear(const Node* node) {
  static const auto kInt8 = c10::Symbol::fromQualString("quantized::linear_dynamic");
  static const auto kFloat16 = c10::Symbol::fromQualString("quantized::linear_dynamic_fp16");
  return node->kind() == kInt8 || node->kind() == kFloat16;
}

bool is_linear(const Node* node) { return node->kind() == c10::aten::linear || is_packed_linear(node); }

bool is_unread_quantized(const Node* node) {
  const std::string kind = node->kind().toQualString();
  const bool is_embedding = kind.starts_with("quantized::embedding");
  const bool is_quantized = kind.starts_with("quantized::") || kind.starts_with("_quantized::") ||
                            kind.starts_with("quantized_decomposed::") || kind.starts_with("onednn::q") ||
                            kind.starts_with("aten::fbgemm_linear_") || kind.starts_with("aten::_weight_int") ||
                            is_aten(node, {"quantize_per_tensor", "quantize_per_channel", "dequantize"});
  return is_quantized && !is_embedding && !is_packed_linear(node);
}

Value* linear_input(const Node* linear) { return const_cast<Value*>(linear->input(0)); }

Value* linear_weight(const Node* linear) { return const_cast<Value*>(linear->input(1)); }

bool is_packed_object(const c10::IValue& value) { return !packed_class(value).empty(); }

bool is_packed_linear_weight(const c10::IValue& value) { return packed_class(value) == kLinearClass; }

std::optional<PackedWeight> packed_weight(const c10::IValue& value) {
  const std::string name = packed_class(value);
  if (name != kLinearClass && name != kEmbeddingClass) {
    return std::nullopt;
  }
  using Object = c10::ivalue::Object;
  using Known = std::pair<c10::weak_intrusive_ptr<Object>, PackedWeight>;
  // A weak pointer keeps the address of a dead object from being used again.
  static std::mutex mutex;
  static auto* known = new std::map<const Object*, Known>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto object = value.toObject();
  if (const auto found = known->find(object.get()); found != known->end()) {
    return found->second.second;
  }
  std::erase_if(*known, [](const auto& entry) { return entry.second.first.expired(); });
  const PackedWeight result = unpacked_sizes(value, name);
  known->emplace(object.get(), Known(c10::weak_intrusive_ptr<Object>(object), result));
  return result;
}

}  // namespace torchgraft
