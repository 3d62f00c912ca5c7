#include <torchgraft/patch/module/verify_results.h>

#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/module/example_inputs.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <sstream>

namespace torchgraft {
namespace {

using Values = std::vector<c10::IValue>;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// How far two orders of the same arithmetic may lie apart, relative to the largest number of a result.
double tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-5;  // such models often take their softmax in float32
    case at::kFloat:
      return 1e-4;
    default:
      return 0.1;  // 16-bit numbers, and what was rounded to integers on the way
  }
}

at::ScalarType coarser(at::ScalarType a, at::ScalarType b) { return tolerance(a) < tolerance(b) ? b : a; }

// The coarsest dtype that the graph computes in: of its weights, and of casts that it names.
at::ScalarType coarsest_dtype(Graph& graph, const Module& module) {
  at::ScalarType result = at::kDouble;
  const auto weaken = [&](const at::Tensor& tensor) {
    if (tensor.defined() && at::isFloatingType(tensor.scalar_type())) {
      result = coarser(result, tensor.scalar_type());
    }
  };
  for (const at::Tensor& parameter : module.parameters()) {
    weaken(parameter);
  }
  for_each_node(graph.block(), [&](Node* node) {
    const std::string kind = node->kind().toQualString();
    if (kind.find("quantize") != std::string::npos || kind.find("autocast") != std::string::npos) {
      result = coarser(result, at::kHalf);
    }
    for (const Value* input : node->inputs()) {
      const auto constant = input->node()->kind() == c10::prim::Constant ? resolve_constant(input) : std::nullopt;
      if (constant && constant->isTensor()) {
        weaken(constant->toTensor());
      }
      const bool names_dtype = is_aten(node, {"to"}) && constant && constant->isInt();
      if (names_dtype && (constant->toInt() == static_cast<int64_t>(at::kHalf) ||
                          constant->toInt() == static_cast<int64_t>(at::kBFloat16))) {
        result = coarser(result, at::kHalf);
      }
    }
  });
  return result;
}

// Effects that PyTorch counts as such, and that nobody sees afterwards.
bool is_harmless(const Node* node) {
  const std::string kind = node->kind().toQualString();
  return only_complains(node) || node->kind() == c10::prim::Enter || node->kind() == c10::prim::Exit ||
         is_aten(node, {"set_grad_enabled"}) || kind.starts_with("aten::is_");
}

// Why running `graph` could be seen afterwards; empty if it could not.
std::string reason_not_to_run(const std::shared_ptr<Graph>& graph, const Module& module) {
  for (const auto& [path, submodule] : module.named_modules()) {
    if (submodule.attr("training", c10::IValue(false)).toBool()) {  // a frozen module has no such attribute
      return (path.empty() ? "the module" : path) + " is in training mode; graft it in eval mode";
    }
  }
  std::string reason;
  std::vector<Node*> writers;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_writer(node)) {
      writers.push_back(node);
    } else if (node->blocks().empty() && node->hasSideEffects() && !is_harmless(node)) {
      reason = "its forward has side effects (" + described(node) + ")";
    }
  });
  if (writers.empty() || !reason.empty()) {
    return reason;
  }
  const SharedMemory memory(graph);
  torch::jit::ValueSet own;
  for_each_node(graph->block(), [&](Node* node) {
    const bool is_stored = node->kind() == c10::prim::GetAttr || node->kind() == c10::prim::Constant;
    if (is_stored && node->output()->type()->cast<c10::TensorType>()) {
      own.insert(node->output());
    }
  });
  own = memory.connected(std::move(own));
  const auto found = std::find_if(writers.begin(), writers.end(),
                                  [&](Node* writer) { return memory.aliases().writesToAlias(writer, own); });
  return found == writers.end() ? "" : "its forward writes into its own tensors (" + described(*found) + ")";
}

// forward may write into its inputs.
Values copies(const Values& arguments) {
  Values result;
  std::transform(arguments.begin(), arguments.end(), std::back_inserter(result),
                 [](const c10::IValue& argument) { return argument.deepcopy(); });
  return result;
}

// Gives the caller's random numbers back.
class KeptGenerator {
 public:
  explicit KeptGenerator(c10::Device device)
      : generator_(at::globalContext().defaultGenerator(device)), state_(generator_.get_state()) {}
  KeptGenerator(const KeptGenerator&) = delete;
  KeptGenerator& operator=(const KeptGenerator&) = delete;
  ~KeptGenerator() { generator_.set_state(state_); }

  bool was_used() const { return !at::equal(generator_.get_state(), state_); }

 private:
  at::Generator generator_;
  at::Tensor state_;
};

c10::IValue run(const Module& module, const char* method, const Values& arguments,
                const std::optional<at::Tensor>& ids = std::nullopt) {
  const at::NoGradGuard no_grad;
  // One run: optimising the graph would take longer.
  const torch::jit::GraphOptimizerEnabledGuard unoptimised(false);
  torch::jit::Kwargs named;
  if (ids) {
    named.emplace("adapter_ids", *ids);
  }
  return module.get_method(method)(copies(arguments), named);
}

// The largest difference of two results, relative to the largest number of the tensor that it is in. Infinite when one
// has numbers where the other has none, or another structure.
class Difference {
 public:
  explicit Difference(at::ScalarType dtype) : coarsest_(dtype) {}

  void add(const c10::IValue& expected, const c10::IValue& actual) {
    if (expected.tagKind() != actual.tagKind()) {
      structure_differs_ = true;
    } else if (expected.isTensor()) {
      add_tensors(expected.toTensor(), actual.toTensor());
    } else if (expected.isTuple()) {
      add_all(expected.toTupleRef().elements().vec(), actual.toTupleRef().elements().vec());
    } else if (expected.isList()) {
      add_all(expected.toListRef().vec(), actual.toListRef().vec());
    } else if (expected.isGenericDict()) {
      const auto others = actual.toGenericDict();
      structure_differs_ = structure_differs_ || expected.toGenericDict().size() != others.size();
      for (const auto& entry : expected.toGenericDict()) {
        const auto other = others.find(entry.key());
        other == others.end() ? void(structure_differs_ = true) : add(entry.value(), other->value());
      }
    }
  }

  bool is_too_large() const { return structure_differs_ || excess_ > 1; }

  std::string text() const {
    std::ostringstream result;
    if (structure_differs_) {
      return "by its structure, a shape or a dtype";
    }
    result << "by " << difference_ << " (at most " << allowed_ << " is rounding)";
    return result.str();
  }

 private:
  void add_all(const std::vector<c10::IValue>& expected, const std::vector<c10::IValue>& actual) {
    structure_differs_ = structure_differs_ || expected.size() != actual.size();
    for (size_t i = 0; i < std::min(expected.size(), actual.size()); ++i) {
      add(expected[i], actual[i]);
    }
  }

  void add_tensors(const at::Tensor& expected, const at::Tensor& actual) {
    if (expected.sizes() != actual.sizes() || expected.scalar_type() != actual.scalar_type()) {
      structure_differs_ = true;
      return;
    }
    // Integers are positions of largest numbers and the like: rounding may swap two.
    if (!at::isFloatingType(expected.scalar_type()) || expected.is_quantized() || expected.numel() == 0) {
      return;
    }
    const at::Tensor wanted = expected.to(at::kDouble);
    const at::Tensor got = actual.to(at::kDouble);
    const at::Tensor finite = wanted.isfinite();
    // Beyond the finite numbers both have the same infinities and NaN.
    const at::Tensor odd = finite.logical_not()
                               .logical_and(wanted.ne(got))
                               .logical_and(wanted.isnan().logical_and(got.isnan()).logical_not());
    const at::Tensor zero = at::zeros({}, wanted.options());
    const double scale = at::where(finite, wanted.abs(), zero).max().item<double>();
    const double largest = odd.any().item<bool>() ? std::numeric_limits<double>::infinity()
                                                  : at::where(finite, (wanted - got).abs(), zero).max().item<double>();
    const double allowed = tolerance(coarser(coarsest_, expected.scalar_type())) * std::max(scale, 1e-3);
    const double excess = std::isnan(largest) ? std::numeric_limits<double>::infinity() : largest / allowed;
    if (excess > excess_ || difference_ == 0) {
      excess_ = excess;
      difference_ = largest;
      allowed_ = allowed;
    }
  }

  at::ScalarType coarsest_;
  bool structure_differs_ = false;
  double excess_ = 0;
  double difference_ = 0;
  double allowed_ = 0;
};

bool all_finite(const c10::IValue& value) {
  bool finite = true;
  value.visit([&](const c10::IValue& part) {
    if (part.isTensor() && at::isFloatingType(part.toTensor().scalar_type()) && !part.toTensor().is_quantized()) {
      finite = finite && part.toTensor().isfinite().all().item<bool>();
    }
    return false;
  });
  return finite;
}

// The sizes that may be the batch's: of the first two dimensions of the tensors among `arguments`.
std::vector<int64_t> batch_sizes(const Values& arguments) {
  std::vector<int64_t> result;
  for (const int64_t dimension : {0, 1}) {
    for (const c10::IValue& argument : arguments) {
      if (argument.isTensor() && argument.toTensor().defined() && argument.toTensor().dim() > dimension) {
        const int64_t size = argument.toTensor().size(dimension);
        if (std::find(result.begin(), result.end(), size) == result.end()) {
          result.push_back(size);
        }
      }
    }
  }
  return result;
}

constexpr const char* kAccept = "; verify=False (C++: GraftOptions::verify = false) grafts without comparing";

// The result of the changed graph for rows of the base.
c10::IValue run_deactivated(const Module& grafted, const Values& arguments, c10::Device device) {
  std::string first_error;
  for (const int64_t size : batch_sizes(arguments)) {
    try {
      return run(grafted, "forward", arguments, at::full({size}, -1, at::TensorOptions(at::kLong).device(device)));
    } catch (const std::exception& error) {
      first_error = first_error.empty() ? one_line(error) : first_error;
    }
  }
  TORCH_CHECK(false, "graft: the base runs on example inputs, but the grafted module fails: ",
              first_error.empty() ? "no argument has a batch" : first_error, kAccept);
}

void compare(const c10::IValue& expected, const c10::IValue& actual, at::ScalarType dtype, const char* what) {
  Difference difference(dtype);
  difference.add(expected, actual);
  TORCH_CHECK(!difference.is_too_large(), "graft: on example inputs the result of ", what, " differs from the base's ",
              difference.text(), ", so the graph was read wrongly; please report the model", kAccept);
}

}  // namespace

std::string verify_results(const Module& base, const Module& grafted, const std::optional<Values>& example,
                           const at::TensorOptions& weights) {
  const auto graph = grafted.get_method("grafted_forward").graph();
  if (const std::string reason = reason_not_to_run(graph, base); !reason.empty()) {
    return reason;
  }
  const char* base_method = is_grafted(base) ? "base_forward" : "forward";
  const Module copy = clone_module(base);  // errors in a module that was frozen may end the process (clone_module.cpp)
  const auto& method = copy.get_method(base_method);
  ExampleInputs inputs = example ? ExampleInputs{{*example}, ""}
                                 : make_example_inputs(method.function().getSchema(), *graph, base, weights);
  const KeptGenerator generator(weights.device());
  for (const Values& arguments : inputs.candidates) {
    c10::IValue expected;
    try {
      expected = run(copy, base_method, arguments);
    } catch (const std::exception& error) {
      TORCH_CHECK(!example, "graft: the base fails on the example inputs: ", one_line(error));
      inputs.reason = "forward fails on inputs that were made up: " + one_line(error);
      continue;
    }
    if (!example && !all_finite(expected)) {  // a mask of the other sense hides all tokens of a row
      inputs.reason = "forward gives no finite numbers on inputs that were made up";
      continue;
    }
    if (generator.was_used()) {
      return "its forward draws random numbers";
    }
    const at::ScalarType dtype = coarsest_dtype(*graph, base);
    compare(expected, run(grafted, "base_forward", arguments), dtype, "the copy of the base");
    compare(expected, run_deactivated(grafted, arguments, weights.device()), dtype, "adapter_ids = -1");
    c10::IValue adapted;
    try {
      adapted = run(grafted, "forward", arguments);
    } catch (const std::exception& error) {
      TORCH_CHECK(false, "graft: the base runs on example inputs, but the grafted module fails: ", one_line(error),
                  kAccept);
    }
    TORCH_CHECK(!all_finite(expected) || all_finite(adapted),
                "graft: the base's result on example inputs is finite, with the adapter it is not; are its weights?",
                kAccept);
    return "";
  }
  return inputs.reason + "; give example inputs";
}

}  // namespace torchgraft
