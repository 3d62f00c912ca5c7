#pragma once

#include <torchgraft/registration/export.h>

#include <string>

namespace torchgraft {

// torch::jit::load() takes a TorchScript file that holds less of a tensor than its shape says, and whoever uses the
// tensor then reads other memory. Throws c10::Error that says what is short, or in which way the file is damaged; the
// message does not name the file. Nothing in the file is run. A host calls it before torch::jit::load().
TORCHGRAFT_API void check_tensor_records(const std::string& path);

}  // namespace torchgraft
