#include <torchgraft/ops/cpu/vectorized/entries.h>

#define TORCHGRAFT_NAME_2(set) #set
#define TORCHGRAFT_NAME(set) TORCHGRAFT_NAME_2(set)

namespace torchgraft::ops::cpu {

const Kernels& TORCHGRAFT_JOIN(kernels_, TORCHGRAFT_INSTRUCTION_SET)() {
  namespace here = TORCHGRAFT_VECTORIZED;
  static const Kernels table{TORCHGRAFT_NAME(TORCHGRAFT_INSTRUCTION_SET), here::dot_product, here::outer_product,
                             here::transpose, here::activate};
  return table;
}

}  // namespace torchgraft::ops::cpu
