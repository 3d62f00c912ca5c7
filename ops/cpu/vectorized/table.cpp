#include <torchgraft/ops/cpu/vectorized/entries.h>

#define TORCHGRAFT_NAME_2(set) #set
#define TORCHGRAFT_NAME(set) TORCHGRAFT_NAME_2(set)

namespace torchgraft::ops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kIsFast = true;
#else
constexpr bool kIsFast = false;
#endif
// With AVX-512 this depends on the processor: kernels.cpp decides.
#ifdef CPU_CAPABILITY_AVX2
constexpr bool kIsFastInBFloat16 = true;
#else
constexpr bool kIsFastInBFloat16 = false;
#endif

const Kernels& TORCHGRAFT_JOIN(kernels_, TORCHGRAFT_INSTRUCTION_SET)() {
  namespace here = TORCHGRAFT_VECTORIZED;
  static const Kernels table{.instruction_set = TORCHGRAFT_NAME(TORCHGRAFT_INSTRUCTION_SET),
                             .is_fast = kIsFast,
                             .is_fast_in_bfloat16 = kIsFastInBFloat16,
                             .has_tiles_of_bfloat16 = false,
                             .dot_product = here::dot_product,
                             .token_product = here::token_product,
                             .token_product_bfloat16 = nullptr,
                             .outer_product = here::outer_product,
                             .transpose = here::transpose,
                             .widen = here::widen,
                             .narrow = here::narrow,
                             .activate = here::activate,
                             .normalize = here::normalize,
                             .residual_norm = here::residual_norm,
                             .attention_workspace = here::attention_workspace,
                             .attention = here::attention,
                             .attention_gradient_workspace = here::attention_gradient_workspace,
                             .attention_gradient = here::attention_gradient};
  return table;
}

}  // namespace torchgraft::ops::cpu
