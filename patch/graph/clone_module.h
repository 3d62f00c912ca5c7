#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// A copy of `module` with types and methods of its own, which may be rewritten. Its parameters are tensors of their own
// on the memory of the module's: a copy costs no second set of weights, moving or converting it leaves the module as it
// is, writing into a weight writes into both. Buffers and other attributes are copied. What was one tensor in the
// module, as tied embeddings are, is one tensor in the copy; torch::jit::Module::clone makes several of it.
torch::jit::Module clone_module(const torch::jit::Module& module);

}  // namespace torchgraft
