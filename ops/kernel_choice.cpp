#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/kernel_choice.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace torchgraft::ops {
namespace {

KernelMode read_environment() {
  const char* value = std::getenv("TORCHGRAFT_KERNELS");
  const std::string_view mode = value == nullptr ? "" : value;
  if (mode.empty() || mode == "auto") {
    return KernelMode::kAuto;
  }
  if (mode == "fused") {
    return KernelMode::kFused;
  }
  TORCH_CHECK(mode == "reference", "TORCHGRAFT_KERNELS: expected \"auto\", \"fused\" or \"reference\", got \"", mode,
              "\"");
  return KernelMode::kReference;
}

std::atomic<KernelMode>& mode_in_use() {
  static std::atomic<KernelMode> mode{read_environment()};
  return mode;
}

bool may_run() {
  const KernelMode mode = kernel_mode();
  return mode == KernelMode::kFused || (mode == KernelMode::kAuto && cpu::kernels().is_fast);
}

}  // namespace

KernelMode kernel_mode() { return mode_in_use().load(std::memory_order_relaxed); }
void set_kernel_mode(KernelMode mode) { mode_in_use().store(mode, std::memory_order_relaxed); }

bool takes_fused_kernels(const at::Tensor& x) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && !at::isTensorSubclassLike(x) && x.layout() == at::kStrided &&
         x.numel() > 0 && may_run();
}

bool takes_fused_kernels(const at::Tensor& x, const Selection& selection) {
  return selection.kind != Selection::Kind::kBase && takes_fused_kernels(x);
}

}  // namespace torchgraft::ops
