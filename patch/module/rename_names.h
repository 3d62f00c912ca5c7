#pragma once

#include <torch/csrc/jit/api/module.h>

#include <map>
#include <string>

namespace torchgraft {

using NewNames = std::map<std::string, std::string>;

// What a base calls by a name that grafting needs gets another one: attributes and methods of `module` itself, and
// arguments of its forward. `module` is a copy, since graphs and types change. Throws c10::Error when `module` has
// nothing of a name, when a new name is none of TorchScript's or is taken, and for forward.
void rename_names(torch::jit::Module& module, const NewNames& names);

// Those of `names` whose old name `module` has.
NewNames names_in(const torch::jit::Module& module, const NewNames& names);

// The same backwards.
NewNames reversed(const NewNames& names);

// The names that a grafted module's base has got, which `adapters` holds.
NewNames remembered_names(const torch::jit::Module& grafted);
void remember_names(torch::jit::Module& adapters, const NewNames& names);

}  // namespace torchgraft
