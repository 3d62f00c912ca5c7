#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <torchgraft/ops/cpu/kernels.h>

#include <string>

namespace torchgraft::ops::cpu {

// Defined by the copies of vectorized/table.cpp.
const Kernels& kernels_default();
#ifdef TORCHGRAFT_X86
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
namespace vectorized_avx512_bf16 {
void token_product_bfloat16(const DotProduct&);
}

namespace {

bool processor_has(const char* name) {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find(name);
  return found != capabilities.end() && found->second.isBool() && found->second.toBool();
}

// The AVX-512 kernels multiply bfloat16 by pairs where the processor can; without that they were not measured. On such
// a processor ATen's products (oneDNN's) are faster than the AVX2 kernels, which widen to float32.
Kernels with_products_of_bfloat16(Kernels table, bool is_avx512) {
  const bool has_pairs = processor_has("avx512_bf16");
  if (is_avx512 && has_pairs) {
    table.token_product_bfloat16 = vectorized_avx512_bf16::token_product_bfloat16;
  }
  table.is_fast_in_bfloat16 = is_avx512 ? has_pairs : table.is_fast_in_bfloat16 && !has_pairs;
  table.has_tiles_of_bfloat16 = processor_has("amx_bf16");
  return table;
}

}  // namespace
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef TORCHGRAFT_X86
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      static const Kernels avx512 = with_products_of_bfloat16(kernels_avx512(), /*is_avx512=*/true);
      return avx512;
    }
    if (capability == "AVX2") {
      static const Kernels avx2 = with_products_of_bfloat16(kernels_avx2(), /*is_avx512=*/false);
      return avx2;
    }
#endif
    return kernels_default();
  }();
  return chosen;
}

}  // namespace torchgraft::ops::cpu
