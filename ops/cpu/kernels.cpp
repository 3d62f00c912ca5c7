#include <ATen/Version.h>
#include <torchgraft/ops/cpu/kernels.h>

#include <string>

namespace torchgraft::ops::cpu {

// Defined by the copies of vectorized/table.cpp.
const Kernels& kernels_default();
#ifdef TORCHGRAFT_X86
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef TORCHGRAFT_X86
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return kernels_avx512();
    }
    if (capability == "AVX2") {
      return kernels_avx2();
    }
#endif
    return kernels_default();
  }();
  return chosen;
}

}  // namespace torchgraft::ops::cpu
