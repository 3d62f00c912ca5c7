#pragma once

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// Inlines `forward` when it hands modules to other methods as arguments (a trace of T5 gives its decoder the encoder's
// embedding). Module::clone() does not renew the types of such arguments: its copies can be saved, but not loaded.
void inline_module_arguments(torch::jit::Module& module);

}  // namespace torchgraft
