#pragma once

#include <torchgraft/registration/export.h>

namespace torchgraft::ops {

// Which CPU kernels the operators run. Results differ by rounding only.
enum class KernelMode {
  kAuto,       // fused where the machine's instruction set has kernels that were measured to win: AVX2 and AVX-512
  kFused,      // wherever they can run
  kReference,  // never: ATen's compositions
};

// TORCHGRAFT_KERNELS=auto|fused|reference, read once (another value throws c10::Error); set_kernel_mode overrules it,
// for all threads.
TORCHGRAFT_API KernelMode kernel_mode();
TORCHGRAFT_API void set_kernel_mode(KernelMode mode);

}  // namespace torchgraft::ops
