#pragma once

#include <torchgraft/patch/life.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// Runs a grafted module on example inputs and compares what must agree: base_forward with rows of adapter_ids = -1; for
// each adapter, the operators with the ATen calls of lower(), and the active adapter with rows of its adapter_ids
// (fresh adapters, which change nothing, with drawn weights); and for a merged adapter the merged base with the
// adapter, as it is and after unmerge_adapter(). `example`: as in GraftOptions.
//
// Returns what was not compared and why, one sentence each. Throws c10::Error when results differ.
TORCHGRAFT_PATCH_API std::vector<std::string> verify(
    const torch::jit::Module& module, const std::optional<std::vector<c10::IValue>>& example = std::nullopt);

}  // namespace torchgraft
