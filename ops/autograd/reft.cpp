#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/reft.h>
#include <torchgraft/ops/reft.h>

namespace torchgraft::ops {
namespace {

// ATen's calls bring their own gradients, of any order and mode.
template <auto* function, typename Signature>
struct DifferentiableReft;

template <auto* function, typename... Ts>
struct DifferentiableReft<function, at::Tensor(Ts...)> {
  static at::Tensor call(Ts... arguments) {
    const bool is_recorded = at::GradMode::is_enabled() && (requires_grad(arguments) || ...);
    if (!is_recorded && !(has_tangent(arguments) || ...)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return function(arguments...);
    }
    const auto args = as_struct<ReftArguments>(arguments...);
    check(args);
    return composed_reft(args, /*recording=*/true);
  }
};

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("reft", TORCH_FN((&DifferentiableReft<reft, std::remove_pointer_t<decltype(&reft)>>::call)));
}

}  // namespace
}  // namespace torchgraft::ops
