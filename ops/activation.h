#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// The values of gated_bottleneck's `non_linearity`, sorted: the parameter-free entries of ACT2FN of transformers 4.57
// and "leakyrelu" of the adapters library. Upper case is folded to lower case, as there.
TORCHGRAFT_API const std::vector<std::string>& non_linearity_names();

namespace ops {

// An elementwise function of the bottleneck's down projection.
struct Activation {
  const char* name;
  at::Tensor (*forward)(const at::Tensor& input);
  // Gradient at the input. `saved` is the function's output when `saves_output`, else its input.
  at::Tensor (*backward)(const at::Tensor& grad, const at::Tensor& saved);
  bool saves_output;
};

// Throws c10::Error, in the name of `op`, that lists the names.
TORCHGRAFT_API const Activation& find_activation(std::string_view name, const char* op = "gated_bottleneck");

}  // namespace ops
}  // namespace torchgraft
