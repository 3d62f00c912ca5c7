#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/kernel_choice.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace torchgraft::ops {
namespace {

bool read_environment() {
  const char* value = std::getenv("TORCHGRAFT_KERNELS");
  if (value == nullptr || std::string_view(value).empty() || std::string_view(value) == "fused") {
    return false;
  }
  TORCH_CHECK(std::string_view(value) == "reference",
              "TORCHGRAFT_KERNELS: expected \"fused\" or \"reference\", got \"", value, "\"");
  return true;
}

std::atomic<bool>& reference_flag() {
  static std::atomic<bool> flag{read_environment()};
  return flag;
}

}  // namespace

bool reference_kernels() { return reference_flag().load(std::memory_order_relaxed); }
void set_reference_kernels(bool reference) { reference_flag().store(reference, std::memory_order_relaxed); }

bool takes_fused_kernels(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return x.is_cpu() && (type == at::kFloat || type == at::kBFloat16) && x.layout() == at::kStrided &&
         !at::isTensorSubclassLike(x) && !reference_kernels();
}

}  // namespace torchgraft::ops
