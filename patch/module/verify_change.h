#pragma once

#include <torchgraft/patch/module/verifier.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// One way of running a module: `method`, with `adapter` active; with an empty `adapter` as the module is.
struct Running {
  torch::jit::Module module;
  const char* method = "forward";
  std::string adapter = {};
};

// Two runs whose results must agree. `what` names the second: "the merged base".
struct SameResult {
  Running before;
  Running after;
  std::string what;
};

// Runs each pair on the same inputs, as verify_results() does: without a trace. `module` is the module before the
// change, whose base_forward, or forward where nothing is grafted, says what inputs there are; `example` as there.
// `is_drawn`: the modules have drawn weights. With those a result may not be finite, and is not compared then.
//
// Returns what was not compared and why, as a sentence for a warning; empty when all was. Throws c10::Error when
// results differ, and when a later run fails on inputs on which the first one succeeds.
std::string verify_change(const torch::jit::Module& module, const std::vector<SameResult>& pairs,
                          const std::optional<std::vector<c10::IValue>>& example, const Verifier& verifier,
                          bool is_drawn = false);

}  // namespace torchgraft
