#include <torchgraft/patch/module/verify_results.h>

#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/module/compare_on_inputs.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/result_difference.h>
#include <torchgraft/patch/module/trial_run.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;

constexpr const char* kAccept = "; verify=False (C++: GraftOptions::verify = false) grafts without comparing";

void add_size(std::vector<int64_t>& sizes, int64_t size) {
  if (size > 0 && std::find(sizes.begin(), sizes.end(), size) == sizes.end()) {
    sizes.push_back(size);
  }
}

// The numbers of rows that the adapted layers may see, likeliest first: the first sizes of tensors among `arguments`,
// the second, lengths of lists, one row, and products of two sizes, where dimensions are joined.
std::vector<int64_t> row_counts(const Arguments& arguments) {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> lengths;
  for (const c10::IValue& argument : arguments) {
    argument.visit([&](const c10::IValue& part) {
      if (part.isTensor() && part.toTensor().defined() && !part.toTensor().is_nested()) {
        tensors.push_back(part.toTensor());
      } else if (part.isList()) {
        lengths.push_back(static_cast<int64_t>(part.toListRef().size()));
      }
      return false;
    });
  }
  std::vector<int64_t> result;
  for (const int64_t dimension : {0, 1}) {
    for (const at::Tensor& tensor : tensors) {
      add_size(result, tensor.dim() > dimension ? tensor.size(dimension) : 0);
    }
  }
  for (const int64_t length : lengths) {
    add_size(result, length);
  }
  add_size(result, 1);
  for (const at::Tensor& tensor : tensors) {
    for (int64_t dimension = 0; dimension + 1 < tensor.dim(); ++dimension) {
      add_size(result, tensor.size(dimension) * tensor.size(dimension + 1));
    }
    add_size(result, tensor.dim() > 2 ? tensor.size(2) : 0);
    add_size(result, tensor.dim() > 0 ? 2 * tensor.size(0) : 0);
  }
  return result;
}

// The two modules on one set of arguments.
class Comparison {
 public:
  Comparison(TrialRun base, TrialRun grafted, const char* base_method, at::ScalarType dtype, c10::Device device)
      : base_(std::move(base)),
        grafted_(std::move(grafted)),
        base_method_(base_method),
        dtype_(dtype),
        device_(device) {}

  // Compares with `expected`, the base's result. Returns what was not compared.
  std::string run_grafted(const Arguments& arguments, const c10::IValue& expected) const {
    std::string missing = compare(expected, run("base_forward", arguments), arguments, "the copy of the base", {});
    std::string reason;
    if (const auto& [ids, actual] = run_deactivated(arguments); ids.defined()) {
      const std::string of_rows = compare(expected, actual, arguments, "adapter_ids = -1", ids);
      missing = missing.empty() ? of_rows : missing;
    } else {
      reason =
          "adapter_ids = -1 was not compared with the base: no size of the inputs is the number of rows that its "
          "layers see";
    }
    const c10::IValue adapted = run("forward", arguments);
    TORCH_CHECK(!all_finite(expected) || all_finite(adapted),
                "graft: the base's result on example inputs is finite, with the adapter it is not; are its weights?",
                kAccept);
    return missing.empty() ? reason : "the result was not compared with the base's: " + missing;
  }

 private:
  [[noreturn]] static void fail(const std::string& error) {
    throw RunFailure("graft: the base runs on example inputs, but the grafted module fails: " + error + kAccept);
  }

  c10::IValue run(const char* method, const Arguments& arguments) const {
    try {
      return grafted_(method, arguments);
    } catch (const std::exception& error) {
      fail(one_line(error));
    }
  }

  // Ids that give each row the base, and the result; undefined when the number of rows is not known: with another
  // number of ids the adapters' operators fail.
  std::pair<at::Tensor, c10::IValue> run_deactivated(const Arguments& arguments) const {
    std::string other_error;  // not about the number of ids
    for (const int64_t rows : row_counts(arguments)) {
      const at::Tensor ids = at::full({rows}, -1, at::TensorOptions(at::kLong).device(device_));
      try {
        return {ids, grafted_("forward", arguments, ids)};
      } catch (const std::exception& error) {
        const std::string text = one_line(error);
        if (other_error.empty() && text.find("adapter_ids") == std::string::npos) {
          other_error = text;
        }
      }
    }
    if (!other_error.empty()) {
      fail(other_error);
    }
    return {};
  }

  // Returns what was not compared.
  std::string compare(const c10::IValue& expected, const c10::IValue& actual, const Arguments& arguments,
                      const char* what, const std::optional<at::Tensor>& ids) const {
    const ResultDifference difference(dtype_, expected, actual);
    if (!difference.is_too_large()) {
      return difference.not_compared();
    }
    const std::optional<bool> agree = dtype_ == at::kDouble ? false : agree_in_double(arguments, ids);
    TORCH_CHECK(agree.value_or(difference.is_of_integers_only()), "graft: on example inputs the result of ", what,
                " differs from the base's ", difference.text(),
                ", so the graph was read wrongly; please report the model", kAccept);
    return agree ? "" : difference.not_compared();
  }

  // nullopt: a graph that names its dtype does not run in another one.
  std::optional<bool> agree_in_double(const Arguments& arguments, const std::optional<at::Tensor>& ids) const {
    try {
      const c10::IValue expected = base_.in_double()(base_method_, arguments);
      const c10::IValue actual = grafted_.in_double()(ids ? "forward" : "base_forward", arguments, ids);
      return !ResultDifference(at::kDouble, expected, actual).is_too_large();
    } catch (const std::exception&) {
      return std::nullopt;
    }
  }

  TrialRun base_;
  TrialRun grafted_;
  const char* base_method_;
  at::ScalarType dtype_;
  c10::Device device_;
};

}  // namespace

std::string verify_results(const Module& base, const Module& grafted, const std::optional<Arguments>& example,
                           const at::TensorOptions& weights) {
  const char* method = is_grafted(base) ? "base_forward" : "forward";
  const Module copy = clone_module(base);  // errors in a module that was frozen may end the process (clone_module.cpp)
  const BaseForward forward{copy, method, graph_of_run(copy, method), graph_of_run(grafted, "grafted_forward"),
                            weights};
  const at::ScalarType dtype = coarsest_dtype(*forward.flat, base);
  const Comparison comparison(TrialRun(copy, forward.graph), TrialRun(grafted, forward.graph), method, dtype,
                              weights.device());
  return compare_on_inputs(forward, example, "graft", "the base's",
                           [&](const Arguments& arguments, const c10::IValue& expected) {
                             return comparison.run_grafted(arguments, expected);
                           });
}

}  // namespace torchgraft
