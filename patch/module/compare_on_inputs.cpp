#include <torchgraft/patch/module/compare_on_inputs.h>

#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/adapters/parallel_rows.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/module/example_inputs.h>
#include <torchgraft/patch/module/result_difference.h>
#include <torchgraft/patch/text_limits.h>
#include <torchgraft/registration/error_text.h>

namespace torchgraft {
namespace {

// Runs `forward`; `result` becomes its result. Returns why inputs that were made up do not do.
std::string try_inputs(const TrialRun& run, const BaseForward& forward, const Arguments& arguments, bool is_given,
                       const char* what, c10::IValue& result) {
  try {
    result = run(forward.method, arguments);
  } catch (const std::exception& error) {
    TORCH_CHECK(!is_given, what, ": the base fails on the example inputs: ", one_line(error));
    return "forward fails on inputs that were made up: " + one_line(error);
  }
  // A mask of the other sense hides all tokens of a row.
  return !is_given && has_nan(result) ? "forward gives NaN on inputs that were made up" : "";
}

}  // namespace

std::shared_ptr<torch::jit::Graph> flat_graph(const torch::jit::Module& grafted) {
  const bool repeats = has_parallel(read_compositions(grafted.attr("adapters").toModule()));
  return repeats ? canonicalise(grafted, "base_forward").graph : graph_of_run(grafted, "grafted_forward");
}

std::string compare_on_inputs(const BaseForward& forward, const std::optional<Arguments>& example, const char* what,
                              const char* other,
                              const std::function<std::string(const Arguments&, const c10::IValue&)>& compare) {
  if (example) {
    check_texts(forward.module, *example, (std::string(what) + ": example inputs").c_str());
  }
  const std::string not_compared = std::string("the result was not compared with ") + other + ": ";
  if (const std::string reason = reason_not_to_run(forward.graph); !reason.empty()) {
    return not_compared + reason;
  }
  ExampleInputs inputs;
  if (example) {
    inputs.candidates.push_back({*example, ""});
  } else {
    const auto& schema = forward.module.get_method(forward.method).function().getSchema();
    inputs = make_example_inputs(schema, *forward.graph, *forward.flat, forward.module, forward.weights);
  }
  const TrialRun run(forward.module, forward.graph);
  std::string run_failure;
  std::string reason = inputs.reason;  // else why the likeliest did not do
  for (const ExampleInputs::Candidate& candidate : inputs.candidates) {
    c10::IValue result;
    const std::string failure = try_inputs(run, forward, candidate.arguments, example.has_value(), what, result);
    if (!failure.empty()) {
      reason = reason.empty() ? failure : reason;
      continue;
    }
    try {
      std::string left = compare(candidate.arguments, result);
      left = left.empty() ? candidate.left_out : left;
      return run_failure.empty() ? left
                                 : left + (left.empty() ? "" : "; ") + "on inputs of another form: " + run_failure;
    } catch (const RunFailure& error) {
      run_failure = run_failure.empty() ? error.what() : run_failure;
    }
  }
  TORCH_CHECK(run_failure.empty(), run_failure);
  return not_compared + reason + "; give example inputs";
}

std::string compare_splitting(const std::string& what, const std::function<std::string()>& compare) {
  try {
    return compare();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(kOtherSizes) == std::string::npos) {
      throw;
    }
    return what + " splits inputs of other sizes than those that were made up; give example inputs";
  }
}

}  // namespace torchgraft
