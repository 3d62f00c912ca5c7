#include <torchgraft/ops/cpu/vectorized/entries.h>

#define TORCHGRAFT_NAME_2(set) #set
#define TORCHGRAFT_NAME(set) TORCHGRAFT_NAME_2(set)

namespace torchgraft::ops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kIsFast = true;
#else
constexpr bool kIsFast = false;
#endif

const Kernels& TORCHGRAFT_JOIN(kernels_, TORCHGRAFT_INSTRUCTION_SET)() {
  namespace here = TORCHGRAFT_VECTORIZED;
  static const Kernels table{TORCHGRAFT_NAME(TORCHGRAFT_INSTRUCTION_SET),
                             kIsFast,
                             here::dot_product,
                             here::outer_product,
                             here::transpose,
                             here::activate,
                             here::attention_workspace,
                             here::attention};
  return table;
}

}  // namespace torchgraft::ops::cpu
