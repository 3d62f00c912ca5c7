#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <string>
#include <string_view>
#include <vector>

// The non-linearities that adapters and heads can name. This folder knows no other one: configurations, plans,
// operators and the patcher all read its table.

namespace torchgraft {

// The functions behind the names: several names may stand for one.
enum class NonLinearity {
  kGelu,
  kGeluClipped,
  kGeluTanh,
  kIdentity,
  kLaplace,
  kLeakyRelu,
  kMish,
  kQuickGelu,
  kRelu,
  kRelu2,
  kRelu6,
  kSigmoid,
  kSilu,
  kTanh,
};

// An elementwise function, as ATen computes it.
struct Activation {
  const char* name;
  NonLinearity function;
  at::Tensor (*forward)(const at::Tensor& input);
  // Gradient at the input. `saved` is the function's output when `saves_output`, else its input.
  at::Tensor (*backward)(const at::Tensor& grad, const at::Tensor& saved);
  bool saves_output;
};

// The values of `non_linearity`, sorted: the parameter-free entries of ACT2FN of transformers 4.57 and "leakyrelu" of
// the adapters library. Upper case is folded to lower case, as there.
TORCHGRAFT_API const std::vector<std::string>& non_linearity_names();

// Throws c10::Error, in the name of `op`, that lists the names.
TORCHGRAFT_API const Activation& find_activation(std::string_view name, const char* op = "gated_bottleneck");

}  // namespace torchgraft
