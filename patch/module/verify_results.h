#pragma once

#include <torchgraft/patch/module/drawn_weights.h>
#include <torchgraft/patch/module/verifier.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

struct BaseAndGrafted {
  torch::jit::Module base;  // before grafting; it may have adapters already
  torch::jit::Module grafted;
};

// Copies of both with_drawn_weights(); none where no weight of `grafted` is zero. `earlier` and `adapters`: those of
// the base and of `grafted`.
std::optional<BaseAndGrafted> with_drawn_weights(const BaseAndGrafted& modules, const std::vector<Adapter>& earlier,
                                                 const std::vector<Adapter>& adapters);

// Runs copies of a base and of the grafted module on the same inputs and compares: grafted's base_forward, its forward
// with adapter_ids = -1, which runs the changed graph, and whether its active adapter gives finite numbers. Compares
// each of `adapters`, too: by its operators, by the ATen calls of lower(), and by adapter_ids; and, in a base that is
// grafted already, rows of each of its adapters. Runs are those of trial_run.h: in eval mode, and without a trace.
// Results that differ in a coarse dtype are compared once more in float64, where rounding moves no step (a top-k, a
// router) to another side.
//
// `drawn`: the same modules with_drawn_weights(), whose adapters may be activated, where some weight is zero. They are
// compared in place of `modules`, of which only the finite numbers are checked. Where drawn weights give others,
// `modules` are compared after all. `example`: the arguments of forward, without self and adapter_ids; nullopt: made up
// (example_inputs.h). `weights`: dtype and device of the base's weights.
//
// Returns what was not compared and why, as a sentence for a warning; empty when all was. Throws c10::Error when
// results differ, and when the grafted module fails on inputs on which the base runs.
std::string verify_results(const BaseAndGrafted& modules, const std::optional<BaseAndGrafted>& drawn,
                           const std::optional<std::vector<c10::IValue>>& example, const at::TensorOptions& weights,
                           const std::vector<std::string>& adapters, const Verifier& verifier);

}  // namespace torchgraft
