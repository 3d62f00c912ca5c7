#include <torchgraft/ops/cpu/kernels.h>

#define TORCHGRAFT_TABLE_2(set) kernels_##set
#define TORCHGRAFT_TABLE(set) TORCHGRAFT_TABLE_2(set)
#define TORCHGRAFT_NAME_2(set) #set
#define TORCHGRAFT_NAME(set) TORCHGRAFT_NAME_2(set)

namespace torchgraft::ops::cpu {

const Kernels& TORCHGRAFT_TABLE(TORCHGRAFT_INSTRUCTION_SET)() {
  static const Kernels table{TORCHGRAFT_NAME(TORCHGRAFT_INSTRUCTION_SET)};
  return table;
}

}  // namespace torchgraft::ops::cpu
