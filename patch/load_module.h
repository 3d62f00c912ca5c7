#pragma once

#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace torchgraft {

// Loads a TorchScript file onto the CPU. torch::jit::load() also takes a file that holds less of a tensor than its
// shape says, and whoever uses the tensor reads other memory: such a file is an error here. A .pt is a program all the
// same: load files of people whose programs you would run. Throws c10::Error that names the file.
TORCHGRAFT_PATCH_API torch::jit::Module load_module(const std::string& path);

}  // namespace torchgraft
