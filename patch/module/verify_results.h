#pragma once

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// Runs a copy of `base` (a module before grafting) and `grafted` on the same inputs and compares: grafted's
// base_forward, its forward with adapter_ids = -1, which runs the changed graph, and whether its active adapter gives
// finite numbers. Compares each of `adapters`, too: by its operators, by the ATen calls of lower(), and by adapter_ids;
// and, in a `base` that is grafted already, a batch of rows of its adapters. Runs are those of trial_run.h: in eval
// mode, and without a trace. Results that differ in a coarse dtype are compared once more in float64, where rounding
// moves no step (a top-k, a router) to another side.
//
// `grafted`: a copy whose adapters may be activated, with_drawn_weights(). `example`: the arguments of forward, without
// self and adapter_ids; nullopt: made up (example_inputs.h). `weights`: dtype and device of the base's weights.
//
// Returns what was not compared and why, as a sentence for a warning; empty when all was. Throws c10::Error when
// results differ, and when the grafted module fails on inputs on which the base runs.
std::string verify_results(const torch::jit::Module& base, const torch::jit::Module& grafted,
                           const std::optional<std::vector<c10::IValue>>& example, const at::TensorOptions& weights,
                           const std::vector<std::string>& adapters);

}  // namespace torchgraft
