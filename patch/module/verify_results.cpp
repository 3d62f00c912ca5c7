#include <torchgraft/patch/module/verify_results.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/canonicalise/decompose_optimized.h>
#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/whole_graphs.h>
#include <torchgraft/patch/insert/decompose_adapters.h>
#include <torchgraft/patch/module/compare_on_inputs.h>
#include <torchgraft/patch/module/compare_rows.h>
#include <torchgraft/patch/module/failure_hints.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/result_difference.h>
#include <torchgraft/patch/module/row_counts.h>
#include <torchgraft/patch/module/trial_run.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;

// Drawn weights may be too large for a dtype or a scaling, which is no fault of the module.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ids that give row i the adapter at first + i in `adapters`; those behind the last adapter begin again.
at::Tensor ids_from(const std::vector<int64_t>& adapters, size_t first, int64_t rows, c10::Device device) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < rows; ++i) {
    ids.push_back(adapters[(first + i) % adapters.size()]);
  }
  return at::tensor(ids, at::TensorOptions(at::kLong).device(device));
}

// How many tokens an adapter puts among the embeddings. A composition has no prompt.
int64_t prompt_length(const Module& adapters, size_t id) {
  for (const auto& buffer : adapters.named_buffers()) {
    if (buffer.name.ends_with(".prompt_length")) {
      return static_cast<int64_t>(id) < buffer.value.size(0) ? buffer.value[static_cast<int64_t>(id)].item<int64_t>()
                                                             : 0;
    }
  }
  return 0;
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
};

// A base and the grafted module on one set of arguments.
class Comparison {
 public:
  // `is_drawn`: results that are not finite are a NotFinite. `is_made_up`: the arguments are.
  Comparison(const BaseAndGrafted& modules, const BaseForward& forward, at::ScalarType dtype, const Verifier& verifier,
             bool is_drawn, bool is_made_up)
      : base_(clone_module(modules.base), forward.graph),
        grafted_(modules.grafted, forward.graph),
        by_calls_(clone_module(grafted_.module), forward.graph),
        base_method_(forward.method),
        dtype_(dtype),
        device_(forward.weights.device()),
        other_dtypes_(other_dtypes(base_.module, dtype, forward.weights)),
        verifier_(verifier),
        is_drawn_(is_drawn),
        is_made_up_(is_made_up),
        splitting_(splitting_compositions(modules.grafted.attr("adapters").toModule())),
        tasks_(task_compositions(modules.grafted.attr("adapters").toModule())) {
    for (const NamedComposition& composition : read_compositions(modules.grafted.attr("adapters").toModule())) {
      if (parallel_channels(composition.tree) > 1) {
        channels_[composition.name] = parallel_channels(composition.tree);
      }
    }
    const auto graph = whole_graph(by_calls_.module, "grafted_forward");
    decompose_optimized(graph);
    decompose_adapters(graph);
    replace_whole_graph(by_calls_.module, "grafted_forward", graph);
  }

  c10::IValue run_base(const Arguments& arguments) const { return run({base_.run, base_method_}, arguments); }

  // Compares with `expected`, the base's result, and compares each of `adapters` with itself, run in other ways.
  // Returns what was not compared.
  std::string run_grafted(const Arguments& arguments, const c10::IValue& expected,
                          const std::vector<std::string>& adapters) const {
    const Trial base{base_.run, base_method_};
    const Trial copy{grafted_.run, "base_forward"};
    std::string missing =
        compare(base, expected, copy, run(copy, arguments), arguments, of_base("the copy of the base"));
    const auto [ids, rows_of_base] = run_rows_of_base(arguments);
    std::string reason;
    if (ids.defined()) {
      const Trial rows{grafted_.run, "forward", ids};
      add(missing, compare(base, expected, rows, rows_of_base, arguments, of_base("adapter_ids = -1")));
      add(missing, compare_earlier(arguments, ids.size(0), expected));
    } else {
      reason =
          "adapter_ids = -1 was not compared with the base: no size of the inputs is the number of rows that its "
          "layers see";
    }
    check_active_is_finite(arguments, expected);
    for (const std::string& adapter : adapters) {
      if (tasks_.count(adapter)) {
        continue;
      }
      const auto compare_one = [&] { return compare_adapter(arguments, adapter, ids, expected); };
      add(missing, may_not_fit(adapter) ? compare_splitting("'" + adapter + "'", compare_one) : compare_one());
    }
    return missing.empty() ? reason : "the result was not compared with the base's: " + missing;
  }

  void check_active_is_finite(const Arguments& arguments, const c10::IValue& of_base) const {
    const std::string active = active_name(grafted_.module);
    if (may_not_fit(active) || tasks_.count(active)) {
      return;
    }
    const c10::IValue adapted = run({grafted_.run, "forward"}, arguments);
    check_drawn_is_finite(adapted, of_base, "the active adapter");
    TORCH_CHECK(!all_finite(of_base) || all_finite(adapted), verifier_.what,
                ": the base's result on example inputs is finite, with the adapter it is not; are its weights?",
                verifier_.remedy);
  }

 private:
  // What is compared with which, for the error.
  struct Names {
    std::string what;
    const char* other;
    const char* therefore = "";
  };

  static Names of_base(const char* what) { return {what, "the base's", ", so the graph was read wrongly"}; }
  static void add(std::string& missing, const std::string& more) { missing = missing.empty() ? more : missing; }

  [[noreturn]] void fail(const std::string& error) const {
    const bool is_of_dtypes = !other_dtypes_.empty() && error.find("dtype") != std::string::npos;
    throw RunFailure(c10::str(verifier_.what, ": the base runs on example inputs, but the grafted module fails: ",
                              error, is_of_dtypes ? other_dtypes_ : verifier_.remedy));
  }

  c10::IValue run(const Trial& trial, const Arguments& arguments) const {
    try {
      return trial(arguments);
    } catch (const std::exception& error) {
      fail(one_line(error));
    }
  }

  void check_drawn_is_finite(const c10::IValue& result, const c10::IValue& of_base, const std::string& whose) const {
    if (is_drawn_ && all_finite(of_base) && !all_finite(result)) {
      throw NotFinite("weights that are zero were compared as they are: with drawn ones in their place the result of " +
                      whose + " is not finite");
    }
  }

  // Ids that give each row the base, and the result with them. Ids are undefined when the number of rows is not known:
  // with another number of ids the adapters' operators fail.
  std::pair<at::Tensor, c10::IValue> run_rows_of_base(const Arguments& arguments) const {
    std::string other_error;  // not about the number of ids
    for (const int64_t rows : row_counts(arguments)) {
      const at::Tensor ids = at::full({rows}, -1, at::TensorOptions(at::kLong).device(device_));
      try {
        return {ids, grafted_.run("forward", arguments, ids)};
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

  // Whether `name` is a composition that splits inputs, and those were made up.
  bool may_not_fit(const std::string& name) const { return is_made_up_ && splitting_.count(name) > 0; }

  // The adapter by its operators, by the ATen calls that define them, and by ids that give it to every row.
  std::string compare_adapter(const Arguments& arguments, const std::string& adapter, const at::Tensor& ids,
                              const c10::IValue& of_base) const {
    const WhileActive of_grafted(grafted_.module, adapter);
    const WhileActive of_calls(by_calls_.module, adapter);
    const std::string name = "'" + adapter + "'";
    const Trial active{grafted_.run, "forward"};
    const c10::IValue expected = run(active, arguments);
    check_drawn_is_finite(expected, of_base, name);
    const Trial calls{by_calls_.run, "forward"};
    std::string missing =
        compare(active, expected, calls, run(calls, arguments), arguments, {name + " by ATen calls", "its operators'"});
    if (ids.defined()) {
      const int64_t position = find_id(grafted_.module.attr("adapters").toModule(), adapter, verifier_.what);
      const Trial by_ids{grafted_.run, "forward", at::full_like(ids, position)};
      add(missing, compare(active, expected, by_ids, run(by_ids, arguments), arguments,
                           {name + " by adapter_ids", "the active adapter's"}));
      const auto parallel = channels_.find(adapter);
      const bool splits = splitting_.count(adapter) > 0;
      if (parallel == channels_.end()) {
        check_row_stays(arguments, name, ids, position, of_base, expected, splits);
      } else if (!splits) {
        check_channels(arguments, name, ids, position, of_base, expected, parallel->second);
      }
    }
    return missing;
  }

  // The adapter in row 0 alone may not change another row instead. One that splits batches may need more rows.
  void check_row_stays(const Arguments& arguments, const std::string& name, const at::Tensor& ids, int64_t position,
                       const c10::IValue& of_base, const c10::IValue& of_adapter, bool splits) const {
    if (ids.size(0) < 2) {
      return;
    }
    const at::Tensor of_first = ids.clone();
    of_first[0] = position;
    c10::IValue of_row;
    try {
      of_row = grafted_.run("forward", arguments, of_first);
    } catch (const std::exception& error) {
      const std::string text = one_line(error);
      if (splits || refuses_mixed_rows(text)) {
        return;
      }
      fail(text);
    }
    TORCH_CHECK(
        !moves_rows(of_base, of_adapter, of_row, ids.size(0)), verifier_.what, ": with adapter_ids that give ", name,
        " to row 0 alone, the module changes the result of another row: it moves rows before its layers or behind "
        "them; order rows outside of the module",
        verifier_.remedy);
  }

  // A Parallel in row 0 alone repeats this row, and leaves the others as they are.
  void check_channels(const Arguments& arguments, const std::string& name, const at::Tensor& ids, int64_t position,
                      const c10::IValue& of_base, const c10::IValue& of_adapter, int64_t channels) const {
    if (ids.size(0) < 2) {
      return;
    }
    const at::Tensor of_first = ids.clone();
    of_first[0] = position;
    std::vector<at::Tensor> of_row = tensors_in(run({grafted_.run, "forward", of_first}, arguments));
    const auto expected = with_first_repeated(of_base, of_adapter, of_row, ids.size(0), channels);
    const ResultDifference difference(dtype_, c10::IValue(expected), c10::IValue(of_row));
    TORCH_CHECK(!difference.is_too_large(), verifier_.what, ": with adapter_ids that give ", name, " to row 0 alone, ",
                "the result differs from that of each row by itself ", difference.text(), "; please report the model",
                verifier_.remedy);
  }

  // Rows of the adapters that the module had before: as many in one batch as there are rows, until each had its turn.
  std::string compare_earlier(const Arguments& arguments, int64_t rows, const c10::IValue& of_base) const {
    std::string missing;
    if (!is_grafted(base_.module)) {
      return missing;
    }
    // Without compositions that split a batch of a certain size; by how many tokens they add.
    std::map<int64_t, std::vector<int64_t>> earlier;
    const Module bank = base_.module.attr("adapters").toModule();
    const std::vector<std::string> names = adapter_names(bank);
    for (size_t id = 0; id < names.size(); ++id) {
      if (splitting_.count(names[id]) == 0 && tasks_.count(names[id]) == 0) {
        earlier[prompt_length(bank, id)].push_back(static_cast<int64_t>(id));
      }
    }
    for (const auto& [length, alike] : earlier) {
      for (size_t first = 0; first < alike.size(); first += rows) {
        const at::Tensor ids = ids_from(alike, first, rows, device_);
        const Trial before{base_.run, "forward", ids};
        const c10::IValue expected = run(before, arguments);
        check_drawn_is_finite(expected, of_base, "the adapters that the module has already");
        const Trial after{grafted_.run, "forward", ids};
        add(missing, compare(before, expected, after, run(after, arguments), arguments,
                             {"rows of the adapters that the module has already", "before"}));
      }
    }
    return missing;
  }

  // Returns what was not compared.
  std::string compare(const Trial& before, const c10::IValue& expected, const Trial& after, const c10::IValue& actual,
                      const Arguments& arguments, const Names& names) const {
    const ResultDifference difference(dtype_, expected, actual);
    const auto missing = explained_by_rounding(difference, dtype_, [&] {
      return ResultDifference(at::kDouble, before.in_double(arguments), after.in_double(arguments));
    });
    TORCH_CHECK(missing, verifier_.what, ": on example inputs the result of ", names.what, " differs from ",
                names.other, " ", difference.text(), names.therefore, fused_encoder_hint(base_.module, base_method_),
                "; please report the model", verifier_.remedy);
    return *missing;
  }

  Tried base_;
  Tried grafted_;
  Tried by_calls_;  // lowered
  const char* base_method_;
  at::ScalarType dtype_;
  c10::Device device_;
  std::string other_dtypes_;
  const Verifier& verifier_;
  bool is_drawn_;
  bool is_made_up_;
  std::set<std::string> splitting_;
  std::set<std::string> tasks_;              // compositions that no row runs, but one of their tasks
  std::map<std::string, int64_t> channels_;  // of compositions with a Parallel
};

}  // namespace

std::optional<BaseAndGrafted> with_drawn_weights(const BaseAndGrafted& modules, const std::vector<Adapter>& earlier,
                                                 const std::vector<Adapter>& adapters) {
  const DrawnCopy copy = with_drawn_weights(modules.grafted, adapters);
  if (!copy.has_drawn) {
    return std::nullopt;
  }
  return BaseAndGrafted{is_grafted(modules.base) ? with_drawn_weights(modules.base, earlier).module : modules.base,
                        copy.module};
}

std::string verify_results(const BaseAndGrafted& modules, const std::optional<BaseAndGrafted>& drawn,
                           const std::optional<Arguments>& example, const at::TensorOptions& weights,
                           const std::vector<std::string>& adapters, const Verifier& verifier) {
  const char* method = is_grafted(modules.base) ? "base_forward" : "forward";
  // Errors in a module that was frozen may end the process (clone_module.cpp). Runs may activate other adapters.
  const BaseAndGrafted copies{clone_module(modules.base), clone_module(modules.grafted)};
  const BaseForward forward{copies.base, method, graph_of_run(copies.base, method), flat_graph(copies.grafted),
                            weights};
  const at::ScalarType dtype = coarsest_dtype(*forward.flat, modules.base);
  const Comparison as_is(copies, forward, dtype, verifier, /*is_drawn=*/false, !example);
  std::optional<Comparison> as_drawn;
  if (drawn) {
    as_drawn.emplace(*drawn, forward, dtype, verifier, /*is_drawn=*/true, !example);
  }
  const auto compare = [&](const Arguments& arguments, const c10::IValue& of_base) {
    if (!as_drawn) {
      return as_is.run_grafted(arguments, of_base, adapters);
    }
    as_is.check_active_is_finite(arguments, of_base);
    try {
      return as_drawn->run_grafted(arguments, as_drawn->run_base(arguments), adapters);
    } catch (const NotFinite& error) {
      const std::string missing = as_is.run_grafted(arguments, of_base, adapters);
      return missing.empty() ? error.what() : missing;
    }
  };
  return compare_on_inputs(forward, example, verifier.what, "the base's", compare);
}

}  // namespace torchgraft
