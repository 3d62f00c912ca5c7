#include <torchgraft/patch/module/verify_results.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/insert/decompose_adapters.h>
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

// Ids that give row i the adapter i % adapters.
at::Tensor ids_of_all(int64_t rows, int64_t adapters, c10::Device device) {
  return at::arange(rows, at::TensorOptions(at::kLong).device(device)).remainder(adapters);
}

// One way of running one of the modules.
struct Trial {
  const TrialRun& run;
  const char* method;
  std::optional<at::Tensor> ids = std::nullopt;

  c10::IValue operator()(const Arguments& arguments) const { return run(method, arguments, ids); }
  c10::IValue in_double(const Arguments& arguments) const { return run.in_double()(method, arguments, ids); }
};

// A module, and how to run it without a trace of the run.
struct Tried {
  Module module;
  TrialRun run;

  Tried(Module tried, const std::shared_ptr<Graph>& graph) : module(std::move(tried)), run(module, graph) {}
  void activate(const std::string& name) const { module.get_method("activate")({name}); }
};

// The modules on one set of arguments.
class Comparison {
 public:
  Comparison(Module base, Module grafted, const BaseForward& forward, at::ScalarType dtype)
      : base_(std::move(base), forward.graph),
        grafted_(std::move(grafted), forward.graph),
        by_calls_(clone_module(grafted_.module), forward.graph),
        base_method_(forward.method),
        dtype_(dtype),
        device_(forward.weights.device()) {
    decompose_adapters(by_calls_.module.get_method("grafted_forward").graph());
  }

  // Compares with `expected`, the base's result, and compares each of `adapters` with itself, run in other ways.
  // Returns what was not compared.
  std::string run_grafted(const Arguments& arguments, const c10::IValue& expected,
                          const std::vector<std::string>& adapters) const {
    const Trial base{base_.run, base_method_};
    const std::string of_base = ", so the graph was read wrongly";
    std::string missing = compare(base, expected, {grafted_.run, "base_forward"}, arguments, "the copy of the base",
                                  "the base's", of_base);
    const at::Tensor ids = ids_of_base(arguments);
    std::string reason;
    if (ids.defined()) {
      add(missing, compare(base, expected, {grafted_.run, "forward", ids}, arguments, "adapter_ids = -1", "the base's",
                           of_base));
      add(missing, compare_earlier(arguments, ids.size(0)));
    } else {
      reason =
          "adapter_ids = -1 was not compared with the base: no size of the inputs is the number of rows that its "
          "layers see";
    }
    const c10::IValue adapted = run({grafted_.run, "forward"}, arguments);
    TORCH_CHECK(!all_finite(expected) || all_finite(adapted),
                "graft: the base's result on example inputs is finite, with the adapter it is not; are its weights?",
                kAccept);
    for (const std::string& adapter : adapters) {
      add(missing, compare_adapter(arguments, adapter, ids));
    }
    return missing.empty() ? reason : "the result was not compared with the base's: " + missing;
  }

 private:
  static void add(std::string& missing, const std::string& more) { missing = missing.empty() ? more : missing; }

  [[noreturn]] static void fail(const std::string& error) {
    throw RunFailure("graft: the base runs on example inputs, but the grafted module fails: " + error + kAccept);
  }

  static c10::IValue run(const Trial& trial, const Arguments& arguments) {
    try {
      return trial(arguments);
    } catch (const std::exception& error) {
      fail(one_line(error));
    }
  }

  // Ids that give each row the base; undefined when the number of rows is not known: with another number of ids the
  // adapters' operators fail.
  at::Tensor ids_of_base(const Arguments& arguments) const {
    std::string other_error;  // not about the number of ids
    for (const int64_t rows : row_counts(arguments)) {
      const at::Tensor ids = at::full({rows}, -1, at::TensorOptions(at::kLong).device(device_));
      try {
        grafted_.run("forward", arguments, ids);
        return ids;
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

  // The adapter by its operators, by the ATen calls that define them, and by ids that give it to every row.
  std::string compare_adapter(const Arguments& arguments, const std::string& adapter, const at::Tensor& ids) const {
    grafted_.activate(adapter);
    by_calls_.activate(adapter);
    const std::string name = "'" + adapter + "'";
    const Trial active{grafted_.run, "forward"};
    const c10::IValue expected = run(active, arguments);
    std::string missing =
        compare(active, expected, {by_calls_.run, "forward"}, arguments, name + " by ATen calls", "its operators'");
    if (ids.defined()) {
      const auto position =
          static_cast<int64_t>(find_adapter(grafted_.module.attr("adapters").toModule(), adapter, "verify"));
      const Trial by_ids{grafted_.run, "forward", at::full_like(ids, position)};
      add(missing, compare(active, expected, by_ids, arguments, name + " by adapter_ids", "the active adapter's"));
    }
    return missing;
  }

  // Rows of the adapters that the module had before, in one batch.
  std::string compare_earlier(const Arguments& arguments, int64_t rows) const {
    if (!is_grafted(base_.module)) {
      return "";
    }
    const size_t earlier = base_.module.attr("adapters").toModule().attr("names").toListRef().size();
    const at::Tensor ids = ids_of_all(rows, static_cast<int64_t>(earlier), device_);
    const Trial before{base_.run, "forward", ids};
    return compare(before, run(before, arguments), {grafted_.run, "forward", ids}, arguments,
                   "rows of the adapters that the module has already", "before");
  }

  // Returns what was not compared.
  std::string compare(const Trial& before, const c10::IValue& expected, const Trial& after, const Arguments& arguments,
                      const std::string& what, const char* other, const std::string& therefore = "") const {
    const ResultDifference difference(dtype_, expected, run(after, arguments));
    if (!difference.is_too_large()) {
      return difference.not_compared();
    }
    const bool is_final = dtype_ == at::kDouble || difference.is_of_structure();
    const std::optional<bool> agree = is_final ? false : agree_in_double(before, after, arguments);
    TORCH_CHECK(agree.value_or(difference.is_of_integers_only()), "graft: on example inputs the result of ", what,
                " differs from ", other, " ", difference.text(), therefore, "; please report the model", kAccept);
    return agree ? "" : difference.not_compared();
  }

  // nullopt: a graph that names its dtype does not run in another one.
  static std::optional<bool> agree_in_double(const Trial& before, const Trial& after, const Arguments& arguments) {
    try {
      return !ResultDifference(at::kDouble, before.in_double(arguments), after.in_double(arguments)).is_too_large();
    } catch (const std::exception&) {
      return std::nullopt;
    }
  }

  Tried base_;
  Tried grafted_;
  Tried by_calls_;  // lowered
  const char* base_method_;
  at::ScalarType dtype_;
  c10::Device device_;
};

}  // namespace

std::string verify_results(const Module& base, const Module& grafted, const std::optional<Arguments>& example,
                           const at::TensorOptions& weights, const std::vector<std::string>& adapters) {
  const char* method = is_grafted(base) ? "base_forward" : "forward";
  const Module copy = clone_module(base);  // errors in a module that was frozen may end the process (clone_module.cpp)
  const BaseForward forward{copy, method, graph_of_run(copy, method), graph_of_run(grafted, "grafted_forward"),
                            weights};
  const Comparison comparison(copy, grafted, forward, coarsest_dtype(*forward.flat, base));
  return compare_on_inputs(forward, example, "graft", "the base's",
                           [&](const Arguments& arguments, const c10::IValue& expected) {
                             return comparison.run_grafted(arguments, expected, adapters);
                           });
}

}  // namespace torchgraft
