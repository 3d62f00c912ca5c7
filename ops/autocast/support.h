#pragma once

#include <ATen/autocast_mode.h>

namespace torchgraft::ops {

// Casts an op's floating arguments (float64 excepted, as torch's own autocast does) to the autocast dtype of `device`
// and keeps autocast off while it lives, so that the op can be dispatched on. Casts of float32 parameters are cached.
template <c10::DeviceType device>
class Autocast {
 public:
  at::Tensor operator()(const at::Tensor& tensor) const { return at::autocast::cached_cast(type_, tensor, device); }
  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& tensor) const {
    return at::autocast::cached_cast(type_, tensor, device);
  }

 private:
  at::ScalarType type_ = at::autocast::get_autocast_dtype(device);
  c10::impl::ExcludeDispatchKeyGuard guard_{at::autocast::get_autocast_dispatch_key_from_device_type(device)};
};

}  // namespace torchgraft::ops
