#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/kernel_mode.h>

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

}  // namespace

KernelMode kernel_mode() { return mode_in_use().load(std::memory_order_relaxed); }
void set_kernel_mode(KernelMode mode) { mode_in_use().store(mode, std::memory_order_relaxed); }

std::string kernel_instruction_set() {
  return at::get_cpu_capability() + (cpu::kernels().token_product_bfloat16 == nullptr ? "" : "+BF16");
}

}  // namespace torchgraft::ops
