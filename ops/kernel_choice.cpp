#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/Version.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/kernel_choice.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <sstream>
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

bool is_fast(at::ScalarType type) {
  return type == at::kFloat ? cpu::kernels().is_fast : cpu::kernels().is_fast_in_bfloat16;
}

bool may_run(at::ScalarType type) {
  const bool has_kernels = type == at::kFloat || type == at::kBFloat16;
  const KernelMode mode = kernel_mode();
  return has_kernels && (mode == KernelMode::kFused || (mode == KernelMode::kAuto && is_fast(type)));
}

const KernelTable& measured() {
  static const KernelTable table = [] {
    const char* path = std::getenv("TORCHGRAFT_KERNEL_TABLE");
    if (path == nullptr || *path == '\0') {
      return KernelTable();
    }
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    TORCH_CHECK(file && text, "TORCHGRAFT_KERNEL_TABLE: ", path, " cannot be read");
    return KernelTable::parse(text.str(), c10::str("TORCHGRAFT_KERNEL_TABLE: ", path));
  }();
  return table;
}

}  // namespace

bool has_memory(const at::Tensor& x) {
  return x.is_cpu() && !at::isTensorSubclassLike(x) && x.layout() == at::kStrided && x.numel() > 0;
}

KernelMode kernel_mode() { return mode_in_use().load(std::memory_order_relaxed); }
void set_kernel_mode(KernelMode mode) { mode_in_use().store(mode, std::memory_order_relaxed); }

std::string kernel_instruction_set() {
  return at::get_cpu_capability() + (cpu::kernels().token_product_bfloat16 == nullptr ? "" : "+BF16");
}

bool takes_fused_kernels(const at::Tensor& x) { return has_memory(x) && may_run(x.scalar_type()); }

bool takes_fused_kernels(FusedOp op, const at::Tensor& x) {
  if (!has_memory(x)) {
    return false;
  }
  if (kernel_mode() == KernelMode::kAuto) {
    const int64_t features = x.size(-1) * (x.dim() == 4 ? x.size(1) : 1);
    if (const auto faster = measured().fused_is_faster(op, x.scalar_type(), x.numel() / features, features)) {
      return *faster;
    }
  }
  return may_run(x.scalar_type());
}

bool takes_fused_gradients(const at::Tensor& x, const at::Tensor& grad) {
  return takes_fused_kernels(x) && takes_fused_kernels(grad) && x.scalar_type() == at::kFloat &&
         grad.scalar_type() == at::kFloat;
}

}  // namespace torchgraft::ops
