#pragma once

#include <torchgraft/patch/life.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// How optimize() works.
struct OptimizeOptions {
  // Leave base_forward of a grafted module as it is: deactivated, its results stay the base's bit for bit. Otherwise
  // they differ by rounding.
  bool exact_base = false;
  VerifyOptions verifying = {};
};

// A copy of `module`, grafted or not, frozen or not, for faster inference: linear maps, each with the function that
// follows it, run as torchgraft::linear, which takes the kernel that is faster (ops/kernel_choice.h), and layer norms
// of a sum as torchgraft::residual_norm. Results are equal up to rounding, which int8 linear maps may enlarge. Weights
// share the memory of the module's own; other methods than forward stay as they are. The result needs libtorchgraft.so,
// also where the module needed none. What runs under torch.autocast stays as it is; linear maps and norms of sparse
// inputs are errors of the result when it runs.
//
// Optimise last: what changes a grafted module (grafting, removing, merging, ...) takes an optimised one, too, but
// gives one that is not optimised. Throws c10::Error when forward has neither a linear map nor a norm of a sum, when
// the module has forward hooks, when an adapter is trainable, and, unless turned off, when a result differs on example
// inputs.
TORCHGRAFT_PATCH_API torch::jit::Module optimize(const torch::jit::Module& module, const OptimizeOptions& options = {});

}  // namespace torchgraft
