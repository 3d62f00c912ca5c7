#include <torchgraft/patch/module/verify_change.h>

#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/module/compare_on_inputs.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/result_difference.h>
#include <torchgraft/patch/module/trial_run.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <optional>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using GraphPtr = std::shared_ptr<Graph>;

// The dtype and device of the first floating-point parameter, of the base where the module is grafted.
at::TensorOptions options_of(const Module& module) {
  for (const auto& parameter : module.named_parameters()) {
    if (at::isFloatingType(parameter.value.scalar_type()) && !parameter.name.starts_with("adapters.")) {
      return parameter.value.options();
    }
  }
  return at::TensorOptions().dtype(at::kFloat);
}

class ChangeComparison {
 public:
  ChangeComparison(const std::vector<SameResult>& pairs, GraphPtr graph, at::ScalarType dtype, const Verifier& verifier,
                   bool is_drawn, bool is_made_up)
      : pairs_(pairs),
        graph_(std::move(graph)),
        dtype_(dtype),
        verifier_(verifier),
        is_drawn_(is_drawn),
        is_made_up_(is_made_up) {}

  // Returns what was not compared.
  std::string compare(const Arguments& arguments) {
    std::string missing;
    for (const SameResult& pair : pairs_) {
      if (runs_no_rows(pair.before)) {
        continue;
      }
      const auto compare_pair = [&] { return compare(pair, arguments); };
      const std::string of_pair =
          may_not_fit(pair.before) ? compare_splitting(pair.what, compare_pair) : compare_pair();
      missing = missing.empty() ? of_pair : missing;
    }
    return missing.empty() ? "" : "the result was not compared with the module as it was: " + missing;
  }

 private:
  struct Trial {
    Module copy;
    TrialRun run;
  };

  // Whether it runs a composition that no row runs, but one of its tasks.
  static bool runs_no_rows(const Running& running) {
    if (!is_grafted(running.module) || std::string(running.method) != "forward") {
      return false;
    }
    const std::string name = running.adapter.empty() ? active_name(running.module) : running.adapter;
    return task_compositions(running.module.attr("adapters").toModule()).count(name) > 0;
  }

  // Whether it runs a composition that splits inputs, and those were made up.
  bool may_not_fit(const Running& running) const {
    return is_made_up_ && is_grafted(running.module) &&
           splitting_compositions(running.module.attr("adapters").toModule()).count(running.adapter) > 0;
  }

  std::string compare(const SameResult& pair, const Arguments& arguments) {
    if (is_drawn_ && !all_finite(run(pair.before, arguments, false))) {
      return "with drawn weights in the place of zeros the result of " + pair.what + " is not finite";
    }
    const ResultDifference difference = difference_of(pair, arguments);
    // Merged weights are rounded as dtype_ is.
    const auto missing = explained_by_rounding(difference, dtype_, [&] {
      return ResultDifference(dtype_, run(pair.before, arguments, true), run(pair.after, arguments, true));
    });
    TORCH_CHECK(missing, verifier_.what, ": on example inputs the result of ", pair.what,
                " is another than it must be: it differs ", difference.text(), "; please report the model",
                verifier_.remedy);
    return *missing;
  }

  ResultDifference difference_of(const SameResult& pair, const Arguments& arguments) {
    try {
      return {dtype_, run(pair.before, arguments, false), run(pair.after, arguments, false)};
    } catch (const std::exception& error) {
      throw RunFailure(c10::str(verifier_.what, ": the module runs on example inputs, but ", pair.what,
                                " fails: ", one_line(error), verifier_.remedy));
    }
  }

  // Runs a copy of the module, one for all its adapters.
  c10::IValue run(const Running& running, const Arguments& arguments, bool in_double) {
    auto found = trials_.find(running.module._ivalue().get());
    if (found == trials_.end()) {
      const Module copy = clone_module(running.module);
      found = trials_.emplace(running.module._ivalue().get(), Trial{copy, TrialRun(copy, graph_)}).first;
    }
    const auto& [copy, trial] = found->second;
    const WhileActive active(copy, running.adapter);
    return (in_double ? trial.in_double() : trial)(running.method, arguments);
  }

  const std::vector<SameResult>& pairs_;
  GraphPtr graph_;
  at::ScalarType dtype_;
  const Verifier& verifier_;
  bool is_drawn_;
  bool is_made_up_;
  std::map<const c10::ivalue::Object*, Trial> trials_;
};

}  // namespace

std::string verify_change(const Module& module, const std::vector<SameResult>& pairs,
                          const std::optional<Arguments>& example, const Verifier& verifier, bool is_drawn) {
  const Module base = clone_module(module);  // errors in a module that was frozen may end the process
  const bool grafted = is_grafted(module);
  const char* method = grafted ? "base_forward" : "forward";
  const BaseForward forward{base, method, graph_of_run(base, method),
                            grafted ? flat_graph(base) : canonicalise(base, method).graph, options_of(base)};
  ChangeComparison comparison(pairs, forward.graph, coarsest_dtype(*forward.flat, base), verifier, is_drawn, !example);
  return compare_on_inputs(
      forward, example, verifier.what, "the module as it was",
      [&](const Arguments& arguments, const c10::IValue&) { return comparison.compare(arguments); });
}

}  // namespace torchgraft
