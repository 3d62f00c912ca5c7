#pragma once

#include <torchgraft/patch/graft_spec.h>
#include <torchgraft/patch/insert/insert.h>

#include <optional>

namespace torchgraft {

// The options for inserting ops into `module`, a base. Throws c10::Error when gate_pooling is unknown, or when
// token_mask_input is no Tensor argument of forward.
InsertOptions insert_options(const GraftOptions& options, const torch::jit::Module& module);

// `options` with those of the graft that made `grafted`, which all adapters of a module share. Throws c10::Error when
// the two contradict each other.
GraftOptions options_like(const torch::jit::Module& grafted, GraftOptions options);

// The sites that a grafted module was made with; nullopt when they were detected.
std::optional<Structure> remembered_sites(const torch::jit::Module& grafted);

}  // namespace torchgraft
