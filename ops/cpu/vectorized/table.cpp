#include <torchgraft/ops/cpu/vectorized/entries.h>

#define TORCHGRAFT_NAME_2(set) #set
#define TORCHGRAFT_NAME(set) TORCHGRAFT_NAME_2(set)

namespace torchgraft::ops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kIsFast = true;
#else
constexpr bool kIsFast = false;
#endif
// With AVX-512 it depends on the processor: kernels.cpp.
#ifdef CPU_CAPABILITY_AVX2
constexpr bool kIsFastInBFloat16 = true;
#else
constexpr bool kIsFastInBFloat16 = false;
#endif

const Kernels& TORCHGRAFT_JOIN(kernels_, TORCHGRAFT_INSTRUCTION_SET)() {
  namespace here = TORCHGRAFT_VECTORIZED;
  static const Kernels table{TORCHGRAFT_NAME(TORCHGRAFT_INSTRUCTION_SET),
                             kIsFast,
                             kIsFastInBFloat16,
                             here::dot_product,
                             here::token_product,
                             nullptr,
                             here::outer_product,
                             here::transpose,
                             here::widen,
                             here::narrow,
                             here::activate,
                             here::normalize,
                             here::attention_workspace,
                             here::attention,
                             here::attention_gradient_workspace,
                             here::attention_gradient};
  return table;
}

}  // namespace torchgraft::ops::cpu
