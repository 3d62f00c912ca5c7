#pragma once

#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace torchgraft {

// SHA-1, in hexadecimal digits, of all numbers of a grafted module's base: parameters, buffers and constants of its
// graph, with their names, dtypes and sizes. Adapters and heads have no part in it. Equal for two modules whose base is
// the same; to tell versions of a model apart, not against who would deceive. Reads all weights. Throws c10::Error when
// the module is not grafted.
TORCHGRAFT_PATCH_API std::string base_digest(const torch::jit::Module& module);

}  // namespace torchgraft
