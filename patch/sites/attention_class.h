#pragma once

#include <torchgraft/plan/structure.h>

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace torchgraft {

// The class of the module around the first layer's query projection; empty when the structure names none.
std::string attention_class(const torch::jit::Module& module, const Structure& structure);

}  // namespace torchgraft
