#pragma once

#include "adapter_store.h"
#include "package.h"
#include "service.h"

#include <memory>
#include <string>

// Makes the pool of `options` one whose banks are those of the package. Throws c10::Error where options ask for what
// the package cannot do: gates over other tokens, or, if has_capacity, another number of rows.
void fit_pool(torchgraft::AdapterPoolOptions& options, const PackageForm& form, bool has_capacity);

// A package that reads the banks of the store's pool. Runs it, with drawn weights in the banks, beside the module, and
// throws c10::Error when the results differ: then it was made of another model, or cannot be written to. Nobody may use
// the store meanwhile.
std::unique_ptr<Package> open_package(const std::string& path, const PackageForm& form, AdapterStore& store,
                                      const torch::jit::Module& module, const ServiceOptions& options);
