#include <ATen/autocast_mode.h>
#include <torch/library.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/linear.h>
#include <torchgraft/ops/reft.h>

#include <type_traits>

namespace torchgraft::ops {
namespace {

// Under autocast an operator casts its floating arguments, float64 excepted, to the low dtype of the device and calls
// itself again without autocast: ATen's own wrapper. ATen's macros around it (KERNEL) can name operators of ATen only.
template <c10::DeviceType device, auto* function>
void register_operator(torch::Library& m, const char* name) {
  using Signature = std::remove_pointer_t<decltype(function)>;
  using InLowPrecision = typename at::autocast::WrapFunction<at::autocast::CastPolicy::lower_precision_fp, device,
                                                             Signature, Signature, function>::type;
  m.impl(name, TORCH_FN(&InLowPrecision::call));
}

// Not among them: attention_token_mask, which compares the mask's values and gives booleans, and residual_norm, which
// leaves dtypes to ATen's calls (forward/residual_norm.cpp).
template <c10::DeviceType device>
void register_operators(torch::Library& m) {
  register_operator<device, gated_lora>(m, "gated_lora");
  register_operator<device, gated_lora_linear>(m, "gated_lora_linear");
  register_operator<device, gated_bottleneck>(m, "gated_bottleneck");
  register_operator<device, gated_bottleneck_linear>(m, "gated_bottleneck_linear");
  register_operator<device, gated_prefix_attention>(m, "gated_prefix_attention");
  register_operator<device, reft>(m, "reft");
  register_operator<device, linear>(m, "linear");
}

TORCH_LIBRARY_IMPL(torchgraft, AutocastCPU, m) { register_operators<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(torchgraft, AutocastCUDA, m) { register_operators<at::kCUDA>(m); }

}  // namespace
}  // namespace torchgraft::ops
