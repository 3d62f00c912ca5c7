#pragma once

#include <torchgraft/registration/export.h>

#include <string>

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

// What a measurement of the kernels depends on: at::get_cpu_capability(), and "+BF16" behind it where kernels use the
// processor's products of bfloat16 ("AVX512+BF16").
TORCHGRAFT_API std::string kernel_instruction_set();

}  // namespace torchgraft::ops
