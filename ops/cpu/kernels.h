#pragma once

namespace torchgraft::ops::cpu {

// The inner loops, on raw pointers: every source of ops/cpu/vectorized/ is compiled once for each instruction set, and
// each copy fills in one of these tables.
struct Kernels {
  const char* instruction_set;  // "default", "avx2" or "avx512"
};

// The table for this machine: what at::get_cpu_capability() says, so ATEN_CPU_CAPABILITY=default|avx2 chooses here too.
const Kernels& kernels();

}  // namespace torchgraft::ops::cpu
