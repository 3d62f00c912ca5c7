#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/cpu/Utils.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/kernel_choice.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

namespace torchgraft::ops {
namespace {

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

// With AMX ATen's products of bfloat16 are faster than the kernels here, which win where there is little to multiply.
bool has_faster_tiles(FusedOp op, const at::Tensor& x, int64_t tokens, int64_t features) {
  if (x.scalar_type() != at::kBFloat16 || !cpu::kernels().has_tiles_of_bfloat16) {
    return false;
  }
  switch (op) {
    case FusedOp::kLora:
      return tokens > 256;
    case FusedOp::kPrefixAttention:
      return x.size(-2) > 128;
    case FusedOp::kBottleneck:
      return tokens * features > 16 * 768;
    default:
      return true;
  }
}

// `linear` of many tokens: on Intel's processors MKL's product is the faster one.
bool has_faster_linear(FusedOp op, int64_t tokens) {
  constexpr int64_t kMany = 192;
  static const bool is_intel = [] {
    const auto capabilities = at::cpu::get_cpu_capabilities();
    const auto name = capabilities.find("cpu_name");
    return name != capabilities.end() && name->second.toStringRef().find("Intel") != std::string::npos;
  }();
  return op == FusedOp::kLinear && is_intel && tokens >= kMany;
}

}  // namespace

bool has_memory(const at::Tensor& x) {
  return x.is_cpu() && !at::isTensorSubclassLike(x) && x.layout() == at::kStrided && x.numel() > 0;
}

bool takes_fused_kernels(const at::Tensor& x) {
  const bool has_faster_products =
      kernel_mode() == KernelMode::kAuto && x.scalar_type() == at::kBFloat16 && cpu::kernels().has_tiles_of_bfloat16;
  return has_memory(x) && may_run(x.scalar_type()) && !has_faster_products;
}

bool takes_fused_kernels(FusedOp op, const at::Tensor& x) {
  if (!has_memory(x)) {
    return false;
  }
  if (kernel_mode() == KernelMode::kAuto) {
    const int64_t features = x.size(-1) * (x.dim() == 4 ? x.size(1) : 1);
    const int64_t tokens = x.numel() / features;
    if (const auto faster = measured().fused_is_faster(op, x.scalar_type(), tokens, features)) {
      return *faster;
    }
    if (has_faster_tiles(op, x, tokens, features) || has_faster_linear(op, tokens)) {
      return false;
    }
  }
  return may_run(x.scalar_type());
}

bool takes_fused_gradients(const at::Tensor& x, const at::Tensor& grad) {
  return takes_fused_kernels(x) && takes_fused_kernels(grad) && x.scalar_type() == at::kFloat &&
         grad.scalar_type() == at::kFloat;
}

}  // namespace torchgraft::ops
